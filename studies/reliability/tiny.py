"""The run that is disturbed: seconds long, with frequent saves and evaluations."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from studies.programs import Running, arguments_of, compiled_fast, devices, start_together

TEXT = "the tokens roll down the hill, and the hill rolls down the tokens. " * 40
TRAIN_STEPS, EVAL_EVERY, CHECKPOINT_EVERY = 20, 5, 3
FIELDS: dict[str, object] = {
    "train_steps": TRAIN_STEPS,
    "log_every": 1,
    "eval_every": EVAL_EVERY,
    "eval_windows": 16,
    "checkpoint_every": CHECKPOINT_EVERY,
    "model.name": "NRGPT_H_FF1",
    "model.attention": "full_rank",
    "model.context_length": 16,
    "model.embed_dim": 8,
    "model.num_heads": 2,
    "model.num_steps": 2,
    "model.dropout": 0.1,
    "model.scan_unroll": 1,
    "data.batch_size": 8,
    "optimizer.name": "adamw",
    "optimizer.accumulation_steps": 1,
}
# Compiled programs can be taken from another run's cache: its place is not a part of their keys.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")


class Whole(NamedTuple):
    """A run that was left alone, and how to start another."""

    corpus: Path
    workdir: Path
    processes: int
    cold: float  # seconds that it took, compiling everything
    warm: float  # and another one, with its cache

    def start(
        self, workdir: Path, before: Callable[[], object] | None = None, **changes: object
    ) -> list[Running]:
        """Its processes, in another run directory; `before` is of `Running`."""
        return start(self.corpus, workdir, self.processes, before, **changes)

    def lend_cache(self, workdir: Path) -> None:
        """Gives compiled programs to a run before it is started."""
        shutil.copytree(self.workdir / "cache", workdir / "cache")


def arguments(corpus: Path, workdir: Path, **changes: object) -> list[str]:
    """The command line of `train`; changes are fields, with __ for a dot."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    fields = {**FIELDS, "data.path": corpus, **changed}
    return ["--config=experiments/text.py", f"--workdir={workdir}", *arguments_of(fields)]


def environment(corpus: Path) -> dict[str, str]:
    """One CPU device, no waiting for the compiler, and what is prepared of the corpus beside it."""
    prepared = {"NRGPT_CACHE_DIR": str(corpus.with_name("prepared"))}
    return {"JAX_PLATFORMS": "cpu", **prepared, **devices(1, compiled_fast())}


def start(
    corpus: Path,
    workdir: Path,
    processes: int = 1,
    before: Callable[[], object] | None = None,
    **changes: object,
) -> list[Running]:
    """Starts a run of one process, or of several that are joined."""
    given, variables = arguments(corpus, workdir, **changes), environment(corpus)
    if processes == 1:
        return [Running("train", *given, environment=variables, before=before)]
    return start_together([given] * processes, variables)


def undisturbed(folder: Path, processes: int = 1) -> Whole:
    """Trains, and trains again with the cache of the first. Raises RuntimeError if it cannot."""
    corpus = folder / "text.txt"
    corpus.write_text(TEXT)
    first, second = folder / f"whole{processes}", folder / f"again{processes}"
    cold = _seconds(corpus, first, processes)
    shutil.copytree(first / "cache", second / "cache")
    warm = _seconds(corpus, second, processes)
    return Whole(corpus, first, processes, cold, warm)


def _seconds(corpus: Path, workdir: Path, processes: int) -> float:
    running = start(corpus, workdir, processes)
    begin = max(process.wait_until_it_begins() for process in running)
    for process in running:
        done = process.end()
        if done.returncode != 0:
            raise RuntimeError(f"the run that is left alone fails: {done.stderr}")
    return time.monotonic() - begin
