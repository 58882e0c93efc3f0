"""Opening checkpoints by the library, with every file damaged in every way."""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import load_config
from nrgpt_jax.runs.pretrained import read_params
from nrgpt_jax.training import optimizers
from nrgpt_jax.training import step as steps
from studies.reliability import judge
from studies.reliability.attempts import Outcome, counted, heard, judged
from studies.reliability.report import Part
from studies.reliability.runs import undisturbed

Reader = Callable[[Path], Any]  # opens a run directory and returns its contents
DAMAGES: dict[
    str, Callable[[bytes, float], bytes | None]
] = {  # of contents, at a place from 0 to 1
    "cut": lambda content, place: content[: int(place * len(content))],
    "emptied": lambda content, place: b"",
    "zeros": lambda content, place: bytes(len(content)),
    "deleted": lambda content, place: None,
    "one bit": lambda content, place: content and flipped(content, int(place * 8 * len(content))),
}


def flipped(content: bytes, bit: int) -> bytes:
    """Return contents with one bit flipped."""
    number = int.from_bytes(content, "little") ^ (1 << bit)
    return number.to_bytes(len(content), "little")


def run(cases: int, seed: int, jobs: int) -> dict[str, Any]:
    """Damaged checkpoints.

    Each case opens a run directory in which one file of a checkpoint was truncated at a random
    place, emptied, zeroed, deleted, or had one random bit flipped. *Training* reads the whole state
    and the data position of the latest checkpoint, and the loss of the best one. *Sampling* reads
    the parameters. An older checkpoint is beside the damaged one, except in the rows "the only
    one".

    *One line*: the checkpoint is refused. *Warning*: the values are right, with a warning.
    *Silent*: wrong values, or an older checkpoint without a warning. Values are compared bit by bit
    with those of an undamaged run.
    """
    del jobs
    outcomes, random = list[Outcome](), np.random.default_rng(seed)
    for processes in (1, 2):
        with undisturbed(processes) as whole:
            for kind in judge.KINDS:
                name = f"{kind}, {processes} process{'es' if processes > 1 else ''}"
                outcomes += try_all(name, whole.workdir, kind, cases, random)
                with copied(whole.workdir) as alone:
                    for step in judge.steps_saved(alone, kind)[:-1]:
                        shutil.rmtree(alone / "checkpoints" / kind / str(step))
                    outcomes += try_all(f"{name}, the only one", alone, kind, 1, random)
    return counted(outcomes)


def try_all(
    name: str, workdir: Path, kind: str, bits: int, random: np.random.Generator
) -> Iterator[Outcome]:
    """Damage each file of the newest checkpoint, and open the run with every reader."""
    newest = f"{kind}/{judge.steps_saved(workdir, kind)[-1]}"
    folder = Path("checkpoints") / newest
    for reader_name, reader in readers(workdir, kind).items():
        wanted, older = reader(workdir), None
        with copied(workdir) as copy, contextlib.suppress(Exception):  # there may be no older step
            shutil.rmtree(copy / folder)
            older = reader(copy)
        for file, how, content in damages(workdir / folder, bits, random):
            with copied(workdir) as copy:
                write(copy / folder / file, content)
                attempt = functools.partial(opened, reader, copy, wanted, older, newest)
                yield f"{name}, {reader_name}", (file, how), *judged(attempt)


def damages(
    folder: Path, bits: int, random: np.random.Generator
) -> Iterator[tuple[Path, str, bytes | None]]:
    """Yield (file, damage, contents) for all damages that change a file of a folder."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for how, damage in DAMAGES.items():
            for _ in range(bits if how == "one bit" and content else 1):
                changed = (
                    damage(content, random.random()) if content or how == "deleted" else content
                )
                if changed != content:
                    yield path.relative_to(folder), how, changed


@contextlib.contextmanager
def copied(workdir: Path) -> Iterator[Path]:
    """Yield a copy of a run directory, with hard links to its files."""
    with tempfile.TemporaryDirectory(dir=workdir.parent) as name:
        skipped = shutil.ignore_patterns("cache", "tensorboard")
        yield shutil.copytree(workdir, Path(name) / "run", ignore=skipped, copy_function=os.link)


def write(path: Path, content: bytes | None) -> None:
    """Replace a file without changing its other hard links; None deletes it."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def opened(reader: Reader, workdir: Path, wanted: Any, older: Any, name: str) -> str:
    """Return the outcome of opening a run whose newest checkpoint is damaged.

    Args:
      reader, workdir: the reader and the damaged run.
      wanted, older: contents of the undamaged run, and of the run without that checkpoint.
      name: name of the checkpoint, which a warning must contain.
    """
    with heard() as said:
        found = reader(workdir)
    warned = name in said.getvalue()
    if found == wanted:
        return "warning" if warned else "fine"
    return "older, with a warning" if found == older and warned else "silent"


def readers(workdir: Path, kind: str) -> dict[str, Reader]:
    """Return the functions that open a checkpoint of this kind, by name."""
    config = load_config(workdir)
    model, mesh = create_model(config), sharding.make_mesh()
    optimizer = optimizers.create_optimizer(
        config.optimizer, config.train_steps, parameter_specs(model)
    )
    shapes = steps.abstract_state(model, optimizer, mesh)

    def sampling(copy: Path) -> dict[str, Any]:
        step, params = read_params(copy, kind, model)
        return {"step": step, **judge.bits(params)}

    def training(copy: Path) -> Any:
        checkpoints = Checkpoints(copy, writable=True)
        if kind == "best":
            return checkpoints.best_loss()
        state, place = checkpoints.restore_latest(shapes) or (None, {})
        assert state is not None, "a run that has checkpoints would begin again"
        return {"place": dict(place), **judge.bits(state)}

    return {"sampling": sampling, "training": training}


PART = Part("checkpoint, opened for", 40, run)
