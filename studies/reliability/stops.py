"""Runs that are told to stop save what they have, say so by their exit code, and go on exactly.

SIGTERM and SIGINT, to a run of one process and to one of two processes of a run, at a time drawn
from all of the run's. Half of the runs compile everything anew.
"""

import shutil
import signal
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.programs import Done
from studies.reliability import endings, judge, moments
from studies.reliability.tiny import Whole, undisturbed
from studies.tables import table

TITLE, CASES = "Told to stop", 20
COLD = 0.5  # share of runs that compile anew


class Stopped(NamedTuple):
    """A run that was sent a signal, and then went on."""

    workdir: Path
    number: int
    after: float  # seconds from its beginning to the signal
    stage: str  # where it was then
    seconds: float  # from the signal to the end of all processes
    ends: list[Done]
    again: list[Done]  # of the start after it


def run(cases: int = CASES, seed: int = 0, jobs: int = 2) -> dict[str, Any]:
    """Stops so many runs of each group. Returns counts, times and what is wrong."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for processes in (1, 2):
            whole = undisturbed(Path(name), processes)
            wanted = judge.read(whole.workdir)
            for number in (signal.SIGTERM, signal.SIGINT):
                key = f"{number.name}, {processes} process{'es' if processes > 1 else ''}"
                stopped = _all(whole, Path(name) / key, number, cases, seed, jobs // processes)
                found[key] = counted([(one, judged(wanted, one)) for one in stopped])
    return found


def _all(whole: Whole, folder: Path, number: int, cases: int, seed: int, jobs: int):
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        yield from pool.map(lambda case: stop(whole, folder, number, case, seed), range(cases))


def stop(whole: Whole, folder: Path, number: int, case: int, seed: int) -> Stopped:
    """One run, stopped, and started again until its end."""
    random = np.random.default_rng([seed, number, whole.processes, case])
    workdir = folder / str(case)
    cold = random.random() < COLD
    if not cold:
        whole.lend_cache(workdir)
    moment = moments.drawn(random, whole.cold if cold else whole.warm)
    running = whole.start(workdir)
    begun = max(process.wait_until_it_begins() for process in running)
    chosen = running[int(random.integers(len(running)))]
    moment(chosen, workdir)
    after = time.monotonic() - begun
    at = moments.stage(workdir) if chosen.is_running() else moments.ENDED
    begin = time.monotonic()
    chosen.send(number)
    done = [endings.end(process) for process in running]
    seconds = time.monotonic() - begin
    again = [endings.end(process) for process in whole.start(workdir)]
    return Stopped(workdir, number, after, at, seconds, done, again)


def codes_of(number: int, processes: int) -> set[int]:
    """The exit codes that say that a signal stopped a run. Joined processes tell each other by
    SIGTERM, whichever signal one of them was sent."""
    return {128 + number} if processes == 1 else {128 + number, 128 + signal.SIGTERM}


def judged(wanted: judge.Run, stopped: Stopped) -> list[str]:
    """What is wrong with a run; then it is removed."""
    codes = {endings.as_a_shell_sees_it(end) for end in stopped.ends}
    done = stopped.stage == moments.ENDED or codes == {0}
    expected = {0} if done else codes_of(stopped.number, len(stopped.ends))
    told = [wrong for end in stopped.ends for wrong in endings.wrong(end, expected)]
    if done and "done; the run is in" not in stopped.ends[0].stderr:
        told.append("exit code 0, and it is not done")
    failed = [end for end in stopped.again if end.returncode != 0]
    told += [f"it does not go on: {endings.last_words(end)}" for end in failed]
    if not failed:
        found = judge.read(stopped.workdir)
        told += judge.differences(wanted, found, all_steps=False)
    shutil.rmtree(stopped.workdir)
    return told


def counted(results: list[tuple[Stopped, list[str]]]) -> dict[str, Any]:
    """The figures of a group."""
    hit = [one for one, _ in results if one.stage != moments.ENDED]
    seconds = [one.seconds for one in hit]
    return {
        "runs": len(results),
        "ended_before": len(results) - len(hit),
        "as_documented": sum(not wrong for _, wrong in results),
        "stages": {s: sum(o.stage == s for o in hit) for s in moments.STAGES[:-1]},
        "median_seconds": statistics.median(seconds) if seconds else None,
        "largest_seconds": max(seconds) if seconds else None,
        "wrong": [
            {"case": n, "stage": o.stage, "after": o.after, "what": wrong[:5]}
            for n, (o, wrong) in enumerate(results)
            if wrong
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    seconds = lambda value: "" if value is None else f"{value:.1f}"
    rows = [
        [
            name,
            group["runs"],
            group["as_documented"],
            group["ended_before"],
            *group["stages"].values(),
            seconds(group["median_seconds"]),
            seconds(group["largest_seconds"]),
        ]
        for name, group in found.items()
    ]
    head = ["signal to", "runs", "stopped and went on exactly", "done before the signal came"]
    head += [f"hit {stage}" for stage in moments.STAGES[:-1]]
    head += ["seconds to the exit, median", "largest"]
    return [
        "Exit codes 143 (SIGTERM) and 130 (SIGINT), of all processes; no traceback; started "
        "again, the run ends bit by bit as one that was left alone. Of two processes one is "
        "sent the signal, and both may end with 143. Times are of a run whose steps take "
        "milliseconds.",
        "",
        *table(head, rows),
    ]
