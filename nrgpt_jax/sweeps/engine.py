"""Training of the runs of a sweep by submitit: in local processes, or as jobs on SLURM.

A run is a run directory and its configuration. Trained runs are skipped, stopped runs resume, and
failed runs are recorded and skipped unless a retry is requested.
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
"""Configurations of runs, by run directory."""

Job: TypeAlias = submitit.Job[None]

LAUNCHERS = ("local", "slurm")
MINUTES, RESTARTS = 60, 1000  # default time limit and number of restarts of a SLURM job
FOREVER = 10**6  # minutes
POLL = 0.5  # seconds


class Launcher(NamedTuple):
    """The launcher of runs, and the number of concurrent jobs."""

    name: str = "local"
    jobs: int = 2
    options: Mapping[str, Any] = {}  # for submitit's executor: timeout_min, slurm_partition, ...


def run_all(
    configs: Configs,
    launcher: Launcher,
    *,
    side_by_side: bool = False,
    retry: bool = False,
    watch: Callable[[], object] = lambda: None,
) -> dict[Path, str]:
    """Train every run that is not trained yet, in the given order.

    A run initialized from the model of another run waits until that run is trained. It is skipped
    if that run fails, or if another process trains that run.

    Args:
      configs: the runs; all directories share one grandparent, which holds the compilation cache.
      launcher: launcher of the runs.
      side_by_side: whether to train runs that differ only in seed, data part and learning rate
        as one program, for an accelerator; runs that were started one by one resume one by one.
      retry: whether to train failed runs again.
      watch: function called every few seconds, and at the end.

    Returns:
      The reasons of failed runs, now or earlier, by run directory.
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
    """Return whether a run is initialized from one of the known runs that is not done yet."""
    parameters = config.init_from
    source = folder_of(parameters, config.seed, workdir).resolve()
    return bool(parameters) and source in known and not is_done(source)


def _parts(configs: Configs, side_by_side: bool) -> list[Configs]:
    """Return groups of runs, each trained as one program."""
    if not side_by_side:
        return [{workdir: config} for workdir, config in configs.items()]
    begun = {w: c for w, c in configs.items() if (w / "checkpoints").exists() or in_use(w)}
    fresh = {w: c for w, c in configs.items() if w not in begun}
    return [*groups(fresh), *({w: c} for w, c in begun.items())]


def _run(
    parts: Sequence[Configs], launcher: Launcher, root: Path, watch: Callable[[], object]
) -> None:
    """Train all parts, and record the reasons of failures.

    On SLURM, all parts form one job array, of which `jobs` run at a time; scripts and logs are in
    `root/jobs`. submitit's local executor starts every job immediately: a part is therefore
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
    """Prepare each distinct data set once, before the runs read it."""
    for fields in {config.data.to_json(): config.data for config in configs}.values():
        load_dataset(fields)


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of one run, or of several side by side, as submitted to an executor."""

    configs: Configs
    sweep: Path | None = None  # folder locked by the local sweep that submitted it; None: on SLURM
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES of the sweep

    def __call__(self) -> None:
        """Train the runs; failures are written to the run directories."""
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
        """Save and end this process when the sweep ends, for whatever reason."""
        os.setpgrp()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores SIGTERM
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # submitit hides all GPUs by it
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
        """Return the job that submitit resubmits after a time limit or a preemption."""
        return submitit.helpers.DelayedSubmission(self)


def _note(runs: Configs, error: BaseException | None) -> None:
    """Record why runs have failed; an interruption from outside is not a failure."""
    if error is None or isinstance(error, (InUse, submitit.core.utils.UncompletedJobError)):
        return
    why = " ".join(str(error).split())[:1000] or type(error).__name__
    for workdir in runs:
        if not is_done(workdir) and not failure_of(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            disk.write_json(workdir / FAILURE_FILE, {"kind": type(error).__name__, "why": why})


@contextlib.contextmanager
def _ends_jobs(running: Sequence[tuple[Job, Configs]]) -> Iterator[Path]:
    """Yield a locked folder; the local jobs save and end when the context releases its lock.

    On CPUs, each job has one core. The jobs import modules from the `sys.path` of this process.
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
    """Submit parts to submitit, which writes to `folder`, and add their jobs to `running`.

    Local jobs do not receive Ctrl-C: submitit would kill them while they save.
    """
    if not parts:
        return
    parameters = {"timeout_min": MINUTES if sweep is None else FOREVER}
    parameters |= {"slurm_array_parallelism": launcher.jobs, **launcher.options}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited by the jobs
    try:
        # A job that reaches its time limit is resubmitted until it is done.
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
