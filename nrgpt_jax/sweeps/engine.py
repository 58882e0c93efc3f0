"""Trains the runs of a sweep by submitit: here, in processes, or as the jobs of a SLURM cluster.

A run is a run directory and its configuration. What is trained is left, what was stopped resumes,
and what has failed is kept apart and left until it is asked for again.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import submitit
from ml_collections import ConfigDict

from nrgpt_jax import disk, host
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.errors import UserError, require, require_choice
from nrgpt_jax.runs.directory import InUse, in_use, locked
from nrgpt_jax.sweeps.progress import FAILURE_FILE, check_same, failure_of, is_done
from nrgpt_jax.sweeps.side_by_side import groups, train_directories
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.loop import train
from nrgpt_jax.training.warm_start import folder_of

Configs: TypeAlias = Mapping[Path, ConfigDict]
"""Of the runs, by run directory."""

Job: TypeAlias = submitit.Job[None]

LAUNCHERS = ("local", "slurm")
MINUTES, RESTARTS = 60, 1000  # of a job on a cluster, by default
FOREVER = 10**6  # minutes
POLL = 0.5  # seconds


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
    require_choice("launcher", launcher.name, LAUNCHERS)
    wrong = launcher.options if launcher.name == "local" else {}
    require(not wrong, "option", wrong, "it is of the launcher slurm")
    for workdir, config in configs.items():
        check_config(config, math.prod(n for n in config.mesh.values() if n > 0))
        check_same(workdir, config)
    todo = {w: c for w, c in configs.items() if not is_done(w) and (retry or not failure_of(w))}
    for workdir in todo:
        (workdir / FAILURE_FILE).unlink(missing_ok=True)
    prepare(todo.values())
    known = {workdir.resolve() for workdir in configs}
    while ready := {w: c for w, c in todo.items() if not _waits(w, c, known)}:
        _run(_parts(ready, side_by_side), launcher, next(iter(configs)).parent.parent, watch)
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
) -> None:
    """Trains, and notes why those failed that did.

    On SLURM all parts are an array, of which `jobs` run at a time; scripts and logs are in
    `root/jobs`. submitit's local executor begins what it is given at once: so here a part is
    submitted when another one has ended.
    """
    here, waiting, running = launcher.name == "local", list(parts), list[tuple[Job, Configs]]()
    at_once = launcher.jobs if here else len(parts)
    with _ends_jobs(running) if here else contextlib.nullcontext(root / "jobs") as folder:
        sweep = folder if here else None
        while waiting or running:
            free = at_once - len(running)
            begun, waiting = waiting[:free], waiting[free:]
            _submit(begun, launcher, folder, sweep, running)
            for job, part in [pair for pair in running if pair[0].done()]:
                running.remove((job, part))
                _note(part, _error_of(job))
            watch()
            time.sleep(POLL)


def _error_of(job: Job) -> Exception | None:
    if isinstance(job, submitit.LocalJob) and not job.paths.result_pickle.exists():
        said = " ".join((job.stderr() or "").strip().splitlines()[-1:])
        return MemoryError(f"its process ended without a result; is the memory full? {said}")
    return job.exception()


def prepare(configs: Iterable[ConfigDict]) -> None:
    """Prepares the data of all of them, which the trainings then find."""
    for fields in {config.data.to_json(): config.data for config in configs}.values():
        load_dataset(fields)


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of one run, or of several side by side, as an executor is given it."""

    configs: Configs
    sweep: Path | None = None  # locked by the sweep on this machine that has started it
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES of that

    def __call__(self) -> None:
        """Trains; what fails is written to the run directory."""
        if self.sweep is not None:
            self._end_with(self.sweep)
        host.use_all_cores(1)
        left = {w.resolve(): config for w, config in self.configs.items() if not is_done(w)}
        for workdir in left:
            workdir.mkdir(parents=True, exist_ok=True)
        stops = (SystemExit,) if self.sweep else ()  # on SLURM it is an exit code
        with contextlib.suppress(*stops):
            if left:
                self._train(left)

    def _end_with(self, sweep: Path) -> None:
        """Ends this process, which saves, when the sweep ends, for whatever reason."""
        os.setpgrp()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # by which submitit hides all GPUs
        os.environ.update({} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus})

        def watch() -> None:
            while in_use(sweep):
                time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()

    def _train(self, runs: Configs) -> None:
        first, config = next(iter(runs.items()))
        host.cache_compilations(first.parent.parent)
        with (
            (first / "log").open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            print(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} begins", flush=True)
            try:
                train_directories(runs) if len(runs) > 1 else train(config, first)
            except Exception as error:
                _note(runs, error)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts again when a job has reached its time limit or was preempted."""
        return submitit.helpers.DelayedSubmission(self)


def _note(runs: Configs, error: BaseException | None) -> None:
    """Writes why runs have failed; what has stopped them from outside is no failure."""
    if error is None or isinstance(error, (InUse, submitit.core.utils.UncompletedJobError)):
        return
    why = " ".join(str(error).split())[:1000] or type(error).__name__
    for workdir in runs:
        if not is_done(workdir) and not failure_of(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            disk.write_json(workdir / FAILURE_FILE, {"kind": type(error).__name__, "why": why})


@contextlib.contextmanager
def _ends_jobs(running: Sequence[tuple[Job, Configs]]) -> Iterator[Path]:
    """A folder whose lock tells jobs of this machine to save and end when the context does.

    On a CPU each job has a core. They find modules as this process does.
    """
    before = dict(os.environ)
    os.environ.update(JAX_NUM_CPU_DEVICES="1", OMP_NUM_THREADS="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory(prefix="nrgpt-sweep-") as folder:
        try:
            with locked(Path(folder)):
                yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)
            while not all(job.done() for job, _ in running):
                time.sleep(POLL)


def _submit(
    parts: Sequence[Configs],
    launcher: Launcher,
    folder: Path,
    sweep: Path | None,
    running: list[tuple[Job, Configs]],
) -> None:
    """Hands parts to submitit, whose scripts, logs and results are in a folder; adds to `running`.

    Ctrl-C does not reach the processes of this machine, which submitit would kill while they save.
    """
    if not parts:
        return
    parameters = {"timeout_min": MINUTES if sweep is None else FOREVER}
    parameters |= {"slurm_array_parallelism": launcher.jobs, **launcher.options}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # they inherit it
    try:
        # A job that comes to its time limit is submitted again, as often as it needs.
        executor = submitit.AutoExecutor(folder, launcher.name, slurm_max_num_timeout=RESTARTS)
        executor.update_parameters(**parameters)
        with executor.batch():
            jobs = [executor.submit(Training(part, sweep, gpus)) for part in parts]
        running += zip(jobs, parts, strict=True)
    except Exception as error:  # submitit raises many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the cluster does not take the jobs: {reason}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
