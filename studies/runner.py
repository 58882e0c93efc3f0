"""The runner of all studies: trains what is not trained yet, in several processes, and measures
what is not measured yet.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import host
from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.errors import FAILED, UserError
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.training.loop import train
from studies.side_by_side import train_directories

Directories = dict[tuple[int, float], Path]
"""Of the runs of a variant, by seed and learning rate."""

ROOT = Path(__file__).resolve().parent.parent


def variants(experiment: Path) -> list[str]:
    """The variants that an experiment file has, by its own `variants()`."""
    return list(load(experiment).variants())


def load(experiment: Path) -> ModuleType:
    """An experiment file as a module."""
    spec = importlib.util.spec_from_file_location(experiment.stem, experiment)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def define_flags(runs: str, seeds: int) -> None:
    """Those that `measure_all` reads, with their defaults."""
    flags.DEFINE_string("runs", runs, "Where the runs are, or are to be.")
    flags.DEFINE_integer("seeds", seeds, "Train so many of each.", 0)
    flags.DEFINE_list("only", [], "Train these variants; all by default.")
    flags.DEFINE_integer("jobs", 2, "Train so many at a time.", 1)
    text = "Train the runs of a variant as one program, for an accelerator (with --jobs=1)."
    flags.DEFINE_boolean("side_by_side", False, text)
    flags.DEFINE_boolean("measure", True, "Measure all that is trained, and write.")
    flags.DEFINE_boolean("again", False, "Measure anew what is measured already.")


def measure_all(
    experiment: Path, measure: Callable[[Path], dict[str, Any]], f: flags.FlagValues
) -> dict[str, list[dict[str, Any]]]:
    """Trains, and measures every run that is trained; the numbers of each variant, seed by seed.

    Args:
      experiment: an experiment file with `variants()`.
      measure: gives the numbers of a run directory, in which they are kept: `<experiment>.json`.
        What is not finite becomes None.
      f: of `define_flags`.
    """
    runs, found = Path(f.runs), dict[str, list[dict[str, Any]]]()
    train_all(experiment, f)
    for variant in variants(experiment) if f.measure else []:
        trained = [workdir for workdir in sorted((runs / variant).glob("*")) if is_done(workdir)]
        for workdir in trained:
            kept = workdir / f"{experiment.stem}.json"
            if f.again or not kept.exists():
                numbers = json.dumps(plain(measure(workdir)), indent=1, allow_nan=False)
                kept.write_text(numbers + "\n")
                print(workdir, "measured", flush=True)
            found.setdefault(variant, []).append(json.loads(kept.read_text()))
        jax.clear_caches()
    return found


def train_all(experiment: Path, f: flags.FlagValues) -> None:
    """Trains what is not trained, seed by seed: `runs/<variant>/<seed>`.

    Raises:
      UserError: some have failed, which is said when the others are done.
    """
    chosen = f.only or variants(experiment)
    cells = [(variant, seed) for seed in range(f.seeds) for variant in chosen]
    prepare(map(load(experiment).get_config, chosen if cells else []))
    with trainers(f.jobs) as pool:
        if f.side_by_side:
            own = {variant: _own_rate(experiment, variant, f) for variant in chosen}
            train_side_by_side(pool, experiment, own)
        started = [start(pool, experiment, Path(f.runs), *cell) for cell in cells]
        ended = zip(started, cells, strict=True)
        failed = [
            f"{v}, seed {seed}" for run, (v, seed) in ended if failure(run, f"{v}, seed {seed}")
        ]
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed ({failed[0]}, ...), see above")


def _own_rate(experiment: Path, variant: str, f: flags.FlagValues) -> Directories:
    rate = load(experiment).get_config(variant).optimizer.learning_rate
    return {(seed, rate): Path(f.runs) / variant / str(seed) for seed in range(f.seeds)}


def failure(run: Future[None], name: str) -> BaseException | None:
    """Waits for a run; why it has failed, which is printed."""
    error = run.exception()
    if error is not None:
        print(f"{name}: {error or type(error).__name__}", flush=True)
    return error


def prepare(configs: Iterable[ConfigDict]) -> None:
    """Prepares the data of all of them, which the trainings then find."""
    for fields in {config.data.to_json(): config.data for config in configs}.values():
        load_dataset(fields)


@contextlib.contextmanager
def trainers(jobs: int) -> Iterator[Executor]:
    """So many processes that train, one run after the other; on a CPU each with a core."""
    before = dict(os.environ)
    os.environ.update(JAX_NUM_CPU_DEVICES="1", OMP_NUM_THREADS="1")  # they inherit it
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin, (os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # where all went well nothing is left to cancel
        os.environ.clear()
        os.environ.update(before)


def _begin(parent: int) -> None:
    """Prepares this process, and ends it when its parent has gone."""
    host.use_all_cores(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()


def start(pool: Executor, experiment: Path, runs: Path, variant: str, seed: int) -> Future[None]:
    """Hands `trainers` the run `runs/<variant>/<seed>`, which goes on from where it was stopped."""
    return pool.submit(_train, experiment, runs / variant / str(seed), variant, seed)


def train_side_by_side(pool: Executor, experiment: Path, workdirs: dict[str, Directories]) -> None:
    """Trains the runs of each variant as one program; those that it cannot are left."""
    started = {v: pool.submit(_train_together, experiment, v, own) for v, own in workdirs.items()}
    for variant, run in started.items():
        failure(run, variant)


def _train_together(experiment: Path, variant: str, workdirs: Directories) -> None:
    begun = lambda workdir: is_done(workdir) or (workdir / "checkpoints").exists()
    left = {at: workdir for at, workdir in workdirs.items() if not begun(workdir)}
    if left:
        print(f"training {variant}, {len(left)} runs", flush=True)
        host.cache_compilations(next(iter(left.values())).parent.parent)
        train_directories(load(experiment).get_config(variant), left)
        jax.clear_caches()


def _train(experiment: Path, workdir: Path, variant: str, seed: int) -> None:
    if is_done(workdir):
        return
    workdir.mkdir(parents=True, exist_ok=True)
    config = load(experiment).get_config(variant)
    config.seed = seed
    print(f"training {workdir}", flush=True)
    host.cache_compilations(workdir.parent.parent)
    with contextlib.ExitStack() as held:
        log = held.enter_context((workdir / "log").open("a"))
        held.enter_context(contextlib.redirect_stdout(log))
        held.enter_context(contextlib.redirect_stderr(log))
        train(config, workdir.resolve())
    jax.clear_caches()


def is_done(workdir: Path) -> bool:
    """Whether a run was trained to its last step."""
    try:
        target = json.loads((workdir / "config.json").read_text())["train_steps"]
    except FileNotFoundError:
        return False
    return any(r["step"] == target and "val/loss" in r for r in read_metrics(workdir))
