"""Trains the runs of a sweep: here, in several processes, or as the jobs of a SLURM cluster.

A run is a run directory and its configuration. What is trained is left, what was stopped resumes,
and what has failed is kept apart and left until it is asked for again.
"""

import contextlib
import dataclasses
import datetime
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
from ml_collections import ConfigDict

from nrgpt_jax import disk, host
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.errors import FAILED, UserError, require, require_choice
from nrgpt_jax.runs.directory import InUse, in_use
from nrgpt_jax.sweeps.progress import FAILURE_FILE, check_same, failure_of, is_done
from nrgpt_jax.sweeps.side_by_side import groups, train_directories
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.loop import train
from nrgpt_jax.training.warm_start import folder_of

Configs: TypeAlias = Mapping[Path, ConfigDict]
"""Of the runs, by run directory."""

LAUNCHERS = ("local", "slurm")
MINUTES, RESTARTS = 60, 1000  # of a job on a cluster, by default
_stopped = threading.Event()  # in a process that trains


class Launcher(NamedTuple):
    """Where runs are trained, and how many at a time."""

    name: str = "local"
    jobs: int = 2
    options: Mapping[str, Any] = {}  # of submitit's executor: timeout_min, slurm_partition, ...


def run_all(
    configs: Configs,
    launcher: Launcher,
    *,
    side_by_side: bool = False,
    retry: bool = False,
    watch: Callable[[], object] = lambda: None,
) -> dict[Path, str]:
    """Trains every run that is not trained yet, in the order given.

    A run that begins with the model of another one waits until that is trained; where it fails,
    or another process trains it, the run is left.

    Args:
      configs: the runs; their directories have one parent's parent, for compiled programs.
      launcher: where.
      side_by_side: runs that differ in seed, part of the data and learning rate alone are trained
        as one program, for an accelerator; those that were begun one by one resume so.
      retry: train again what has failed.
      watch: called every few seconds, and at the end.

    Returns:
      Why those that have failed did, now or before.
    """
    for workdir, config in configs.items():
        check_config(config, math.prod(n for n in config.mesh.values() if n > 0))
        check_same(workdir, config)
    todo = {w: c for w, c in configs.items() if not is_done(w) and (retry or not failure_of(w))}
    for workdir in todo:
        (workdir / FAILURE_FILE).unlink(missing_ok=True)
    prepare(todo.values())
    known = {workdir.resolve() for workdir in configs}
    while ready := {w: c for w, c in todo.items() if not _waits(w, c, known)}:
        parts = _parts(ready, side_by_side)
        while parts:
            parts = _run(parts, launcher, next(iter(configs)).parent.parent, watch)
        todo = {w: c for w, c in todo.items() if w not in ready}
    watch()
    return {workdir: why for workdir in configs if (why := failure_of(workdir))}


def _waits(workdir: Path, config: ConfigDict, known: Collection[Path]) -> bool:
    """Whether a run begins with the model of one of these that is not trained to its end."""
    parameters = config.init_from
    source = folder_of(parameters, config.seed, workdir).resolve()
    return bool(parameters) and source in known and not is_done(source)


def _parts(configs: Configs, side_by_side: bool) -> list[Configs]:
    """What is trained as one program each."""
    if not side_by_side:
        return [{workdir: config} for workdir, config in configs.items()]
    begun = {w: c for w, c in configs.items() if (w / "checkpoints").exists() or in_use(w)}
    fresh = {w: c for w, c in configs.items() if w not in begun}
    return [*groups(fresh), *({w: c} for w, c in begun.items())]


def _run(
    parts: Sequence[Configs], launcher: Launcher, root: Path, watch: Callable[[], object]
) -> list[Configs]:
    """Trains, and gives those that never began because the process of another was killed."""
    began, left = time.time(), list[Configs]()
    with executor(launcher, root) as submit:
        jobs = submit([Training(part) for part in parts])
        while not all(job.done() for job in jobs):
            watch()
            time.sleep(1.0)
        for part, job in zip(parts, jobs, strict=True):
            error = job.exception()
            if isinstance(error, BrokenProcessPool) and not _has_begun(part, began):
                left.append(part)
            elif isinstance(error, BrokenProcessPool):
                _note(part, MemoryError("its process was killed; is the memory full?"))
            else:
                _note(part, error)
    if len(left) == len(parts):
        raise UserError("the processes of the sweep end before they begin; see the logs")
    return left


def _has_begun(part: Configs, since: float) -> bool:
    logs = [workdir / "log" for workdir in part]
    return any(log.exists() and log.stat().st_mtime >= since for log in logs)


def prepare(configs: Iterable[ConfigDict]) -> None:
    """Prepares the data of all of them, which the trainings then find."""
    for fields in {config.data.to_json(): config.data for config in configs}.values():
        load_dataset(fields)


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of one run, or of several side by side, as an executor is given it."""

    configs: Configs

    def __call__(self) -> None:
        """Trains; what fails is written to the run directory."""
        if _stopped.is_set():  # by Ctrl-C: a pool would hand out what is queued already
            return
        left = {w.resolve(): config for w, config in self.configs.items() if not is_done(w)}
        for workdir in left:
            workdir.mkdir(parents=True, exist_ok=True)
        if len(left) > 1:
            self._log(left, train_directories, left)
        elif left:
            [(workdir, config)] = left.items()
            self._log(left, train, config, workdir)
        jax.clear_caches()

    def _log(self, runs: Configs, work: Callable[..., object], *arguments: object) -> None:
        first = next(iter(runs))
        host.cache_compilations(first.parent.parent)
        with contextlib.ExitStack() as locked:
            log = locked.enter_context((first / "log").open("a"))
            log.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} begins\n")
            log.flush()
            locked.enter_context(contextlib.redirect_stdout(log))
            locked.enter_context(contextlib.redirect_stderr(log))
            try:
                work(*arguments)
            except (SystemExit, KeyboardInterrupt):
                _stopped.set()
                raise
            except Exception as error:
                _note(runs, error)

    def checkpoint(self) -> Any:
        """What submitit starts again when a job has reached its time limit or was preempted."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _note(runs: Configs, error: BaseException | None) -> None:
    """Writes why runs have failed; what has stopped them from outside is no failure."""
    stopped = isinstance(error, (SystemExit, KeyboardInterrupt, CancelledError, InUse))
    if error is None or stopped or type(error).__name__ == "UncompletedJobError":  # of submitit
        return
    why = " ".join(str(error).split())[:1000] or type(error).__name__
    for workdir in runs:
        if not is_done(workdir) and not failure_of(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            disk.write_json(workdir / FAILURE_FILE, {"kind": type(error).__name__, "why": why})


@contextlib.contextmanager
def executor(launcher: Launcher, root: Path) -> Iterator[Callable[[Sequence[Training]], list[Any]]]:
    """A function that begins trainings; what it returns has `done` and `exception`.

    Raises:
      UserError: the launcher is not known, or not installed.
    """
    require_choice("launcher", launcher.name, LAUNCHERS)
    if launcher.name == "slurm":
        yield lambda trainings: submit_jobs(launcher, root, trainings)
        return
    require(not launcher.options, "option", dict(launcher.options), "it is of the launcher slurm")
    with trainers(launcher.jobs) as pool:
        yield lambda trainings: [pool.submit(training) for training in trainings]


def submit_jobs(
    launcher: Launcher, root: Path, trainings: Sequence[Training], cluster: str = "slurm"
) -> list[Any]:
    """Hands trainings to submitit: on SLURM as an array, of which `jobs` run at a time.

    Its scripts and logs are in `root/jobs`.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("the launcher slurm needs submitit: pip install -e '.[sweep]'") from None
    parameters = {
        "timeout_min": MINUTES,
        "slurm_array_parallelism": launcher.jobs,
        **launcher.options,
    }
    try:
        # A job that comes to its time limit is submitted again, as often as it needs.
        created = submitit.AutoExecutor(
            root / "jobs", cluster=cluster, slurm_max_num_timeout=RESTARTS
        )
        created.update_parameters(**parameters)
        with created.batch():
            return [created.submit(training) for training in trainings]
    except Exception as error:  # it raises many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the cluster does not take the jobs: {reason}") from None


@contextlib.contextmanager
def trainers(jobs: int) -> Iterator[ProcessPoolExecutor]:
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
