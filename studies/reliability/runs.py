"""Descriptions of disturbances, and functions that run, disturb, resume and judge runs.

A run takes seconds, with frequent saves and evaluations.
"""

import collections
import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from nrgpt_jax.errors import FAILED, MISTAKE
from studies.programs import Done, Running, arguments_of, compiled_fast, devices, start_together
from studies.reliability import judge, moments
from studies.reliability.judge import SHORT
from studies.reliability.moments import ENDED, TRAIN_STEPS, stage

TEXT = "the tokens roll down the hill, and the hill rolls down the tokens. " * 40
FLAGS = f"""
--config=experiments/text.py --config.train_steps={moments.TRAIN_STEPS} --config.log_every=1
--config.eval_every={moments.EVAL_EVERY} --config.eval_windows=16
--config.checkpoint_every={moments.CHECKPOINT_EVERY} --config.model.name=NRGPT_H_FF1
--config.model.attention=full_rank --config.model.context_length=16 --config.model.embed_dim=8
--config.model.num_heads=2 --config.model.num_steps=2 --config.model.dropout=0.1
--config.model.scan_unroll=1 --config.data.batch_size=8 --config.optimizer.name=adamw
--config.optimizer.accumulation_steps=1
""".split()
PATIENCE = 400.0  # seconds after which a program counts as hung
TRACEBACK = "Traceback (most recent call last)"
# Runs share compiled programs: without XLA's own caches, the cache path is not part of their keys.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")


class Disturbance(NamedTuple):
    """A start of `train`, its disturbance, and how it must end."""

    codes: Collection[int]  # documented exit codes; 0: after the last step
    fields: Mapping[str, object] = {}  # configuration fields
    before: Callable[[], object] | None = None  # called in its process before it begins
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    when: moments.Moment = moments.after(0.0)  # waits for the moment of `act`
    act: Callable[[Running, Path], object] | None = None  # disturbs the program
    process: int = 0  # index of the disturbed process
    check: Callable[[Path, Done], list[str]] = lambda workdir, done: []  # returns further failures


RESUMED = Disturbance({0})  # the same command again


class Case(NamedTuple):
    """A disturbed run, which must end bit-identical to the undisturbed one if `equal`."""

    name: str
    disturbances: list[Disturbance]  # in order
    cold: bool = False  # whether it starts without a compilation cache
    equal: bool = True
    all_steps: bool = False  # of `judge.differences`


class Result(NamedTuple):
    """The result of a case."""

    name: str
    hits: list[str]  # the stages in which it was hit, of `moments.STAGES`
    seconds: list[float]  # from each hit to the end of all processes
    wrong: list[str]


class Whole(NamedTuple):
    """An undisturbed run, and methods to start others."""

    corpus: Path
    workdir: Path
    processes: int
    cold: float = 0.0  # seconds without a compilation cache
    warm: float = 0.0  # seconds with it

    def start(self, workdir: Path, one: Disturbance = RESUMED) -> list[Running]:
        """Start a run in another run directory and return its processes."""
        fields = {"data.path": self.corpus, **one.fields}
        given = [*FLAGS, f"--workdir={workdir}", *arguments_of(fields)]
        if self.processes > 1:
            return start_together([given] * self.processes, self.environment())
        return [Running("train", *given, environment=self.environment(), before=one.before)]

    def environment(self) -> dict[str, str]:
        """Return variables for one CPU device, fast compilation, and a shared prepared corpus."""
        prepared = {"NRGPT_CACHE_DIR": str(self.corpus.with_name("prepared"))}
        return {"JAX_PLATFORMS": "cpu", **prepared, **devices(1, compiled_fast())}

    def lend_cache(self, workdir: Path) -> None:
        """Link the compilation cache into the directory of a run that is not started yet."""
        workdir.mkdir(parents=True)
        (workdir / "cache").symlink_to(self.workdir / "cache")


@contextlib.contextmanager
def undisturbed(processes: int = 1) -> Iterator[Whole]:
    """Train in a temporary folder, once without and once with a compilation cache.

    Raises:
      RuntimeError: the training fails.
    """
    with tempfile.TemporaryDirectory() as name:
        whole = Whole(Path(name) / "text.txt", Path(name) / "whole", processes)
        whole.corpus.write_text(TEXT)
        cold = _seconds(whole, whole.workdir)
        whole.lend_cache(Path(name) / "again")
        yield whole._replace(cold=cold, warm=_seconds(whole, Path(name) / "again"))


def _seconds(whole: Whole, workdir: Path) -> float:
    running = whole.start(workdir)
    begin = max(process.wait_until_it_begins() for process in running)
    for process in running:
        done = process.end()
        if done.returncode != 0:
            raise RuntimeError(f"the undisturbed run fails: {done.stderr}")
    return time.monotonic() - begin


def run_all(
    whole: Whole, cases: Iterable[Case], folder: Path | None = None, jobs: int = 1
) -> list[Result]:
    """Run cases in a folder, `jobs` at a time; by default beside the undisturbed run."""
    wanted = judge.read(whole.workdir)
    folder = folder or whole.workdir.parent

    def of_case(numbered: tuple[int, Case]) -> Result:
        number, case = numbered
        workdir = folder / f"case{number}"
        result = run_case(whole, wanted, case, workdir)
        shutil.rmtree(workdir, ignore_errors=True)
        print(
            f"{case.name}, {', '.join(result.hits)}: {result.wrong or 'as documented'}", flush=True
        )
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(of_case, enumerate(cases)))


def run_case(whole: Whole, wanted: judge.Run, case: Case, workdir: Path) -> Result:
    """Disturb a run, wait for its end, and compare it with the undisturbed one."""
    result = Result(case.name, [], [], [])
    if not case.cold:
        whole.lend_cache(workdir)
    for one in case.disturbances:
        with one.around():
            running = whole.start(workdir, one)
            hit, chosen = "", running[one.process]
            if one.act:
                one.when(chosen, workdir)
                hit = stage(workdir) if chosen.is_running() else ENDED
                one.act(chosen, workdir)
            begin = time.monotonic()
            ends = [end(process) for process in running]
        if hit and hit != ENDED:
            result.seconds.append(time.monotonic() - begin)
        if hit or (0 in one.codes and ends[0].returncode):  # ended early, though 0 is allowed
            result.hits.append(hit or stage(workdir))
        for done in ends:
            result.wrong.extend(wrong_end(done, one.codes) + one.check(workdir, done))
        wanted_step = one.fields.get("train_steps", TRAIN_STEPS)
        if ends[0].returncode == 0 and judge.steps_saved(workdir, "latest")[-1:] != [wanted_step]:
            result.wrong.append("exit code 0 before its last step was saved")
    if case.equal and not result.wrong:
        found = judge.read(workdir)
        result.wrong.extend(judge.differences(wanted, found, all_steps=case.all_steps))
        result.wrong.extend(f"{name} is left behind" for name in judge.unfinished(workdir))
    return result


def send(number: int) -> Callable[[Running, Path], object]:
    """Return an action that sends a signal."""
    return lambda running, workdir: running.send(number)


def end(running: Running, seconds: float = PATIENCE) -> Done:
    """Wait for the end of a program; a hung one is killed, as its exit code shows."""
    try:
        return running.end(seconds)
    except TimeoutError:
        running.send(signal.SIGKILL)
        return running.end()


def wrong_end(done: Done, codes: Collection[int]) -> list[str]:
    """Return the failures of an exit: a wrong exit code (as in a shell), a traceback, or a number
    of error lines other than one on an error and zero otherwise."""
    wrong, code = [], done.returncode or 0
    code = 128 - code if code < 0 else code
    last = " | ".join(done.stderr.splitlines()[-3:])[-SHORT:]
    if code not in codes:
        wrong.append(f"exit code {code}, not {sorted(codes)}: {last}")
    if TRACEBACK in done.stderr:
        wrong.append(f"a traceback: {done.stderr.partition(TRACEBACK)[2][-SHORT:]}")
    count = sum(line.startswith("error: ") for line in done.stderr.splitlines())
    if count != (code in (FAILED, MISTAKE)):
        wrong.append(f"{count} lines of error: {last}")
    return wrong


def counted(results: Iterable[Result], timed: bool = False) -> dict[str, Any]:
    """Return the figures by case name, with seconds if `timed`, and the failures."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    rows: dict[str, dict[str, Any]] = {}
    for name, group in by_name.items():
        hits = collections.Counter(hit for result in group for hit in result.hits)
        good = sum(not result.wrong for result in group)
        rows[name] = {"as documented": f"{good} of {len(group)}"}
        rows[name] |= {stage: hits[stage] for stage in moments.STAGES if hits}
        seconds = [value for result in group for value in result.seconds]
        if timed and seconds:
            text = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"
            rows[name]["seconds to the exit: median, largest"] = text
    wrong = [result._asdict() for group in by_name.values() for result in group if result.wrong]
    return {"rows": rows, "wrong": wrong}
