"""A run directory that is deleted while a run trains in it; clocks that are wrong."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from studies.reliability import endings, judge, moments
from studies.reliability.endings import MACHINE, Result
from studies.reliability.tiny import CHECKPOINT_EVERY, EVAL_EVERY, Whole

SOON = 3.0  # seconds


def tried(whole: Whole, wanted: judge.Run, folder: Path) -> Iterator[Result]:
    """All of it."""
    for step in (1, 2 * CHECKPOINT_EVERY + 1, 3 * EVAL_EVERY):
        yield _deleted(whole, folder / "deleted", step)
    for change in (backwards, set_back, set_forward):
        yield _with_clock(whole, wanted, folder / "clock", change)


def _deleted(whole: Whole, workdir: Path, step: int) -> Result:
    """The run directory is deleted when the metrics of a step are there."""
    whole.lend_cache(workdir)
    (running,) = whole.start(workdir)
    moments.in_evaluation(step, 0.0)(running, workdir)
    gone = workdir.rename(workdir.with_name("gone"))
    shutil.rmtree(gone, ignore_errors=True)  # where something is still written
    wrong = endings.wrong(endings.end(running), MACHINE)
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(workdir, ignore_errors=True)  # what was made anew
    return Result("run directory deleted", f"after step {step}", wrong)


def _with_clock(
    whole: Whole, wanted: judge.Run, workdir: Path, change: Callable[[], None]
) -> Result:
    """Trains by a clock of the day that is wrong."""
    whole.lend_cache(workdir)
    (running,) = whole.start(workdir, before=change)
    done = endings.end(running)
    wrong = endings.wrong(done, {0})
    if done.returncode == 0:
        wrong += judge.differences(wanted, judge.read(workdir))
    shutil.rmtree(workdir)
    return Result("clock " + change.__name__.replace("_", " "), "", wrong)


def backwards() -> None:
    """The clock of this process goes backwards, twice as fast."""
    begin = time.time()
    _clock(lambda now: begin - 2.0 * (now - begin))


def set_back() -> None:
    """The clock of this process is set back by an hour, soon after it begins."""
    begin = time.monotonic()
    _clock(lambda now: now - 3600.0 * (time.monotonic() > begin + SOON))


def set_forward() -> None:
    """The clock of this process is set forward by an hour, soon after it begins."""
    begin = time.monotonic()
    _clock(lambda now: now + 3600.0 * (time.monotonic() > begin + SOON))


def _clock(wrong: Callable[[float], float]) -> None:
    right = time.time
    time.time = lambda: wrong(right())
    time.time_ns = lambda: int(1e9 * time.time())
