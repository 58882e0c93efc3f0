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

from studies.programs import Done, Running
from studies.reliability import judge, moments
from studies.reliability.tiny import EVAL_EVERY, Whole, undisturbed
from studies.tables import table

TITLE, CASES = "Told to stop", 20
GROUPS = tuple((n, number) for n in (1, 2) for number in (signal.SIGTERM, signal.SIGINT))
COLD = 0.5  # share of runs that compile anew
PATIENCE = 400.0  # seconds until a run that does not end is called hung
TRACEBACK = "Traceback (most recent call last)"


class Stopped(NamedTuple):
    """A run that was sent a signal, and then went on."""

    workdir: Path
    number: int
    after: float  # seconds from its beginning to the signal
    stage: str  # where it was then
    codes: list[int]  # exit codes as a shell sees them; of a hung process, 0 - 1
    seconds: float  # from the signal to the end of all processes
    told: list[str]  # stderr
    errors: list[str]  # of the start after it


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
    after = random.uniform(0.0, whole.cold if cold else whole.warm)
    running = whole.start(workdir)
    for process in running:
        process.wait_until_it_begins()
    chosen = running[int(random.integers(len(running)))]
    moments.at(after)(chosen, workdir)
    at = moments.stage(workdir, EVAL_EVERY) if chosen.is_running() else moments.ENDED
    begin = time.monotonic()
    chosen.send(number)
    done = [_end(process, begin) for process in running]
    seconds = time.monotonic() - begin
    again = [process.end() for process in whole.start(workdir)]
    errors = [d.stderr for d in again if d.returncode != 0]
    codes = [_as_a_shell_sees_it(d.returncode) for d in done]
    return Stopped(workdir, number, after, at, codes, seconds, [d.stderr for d in done], errors)


def _end(process: Running, begin: float) -> Done:
    try:
        return process.end(PATIENCE + begin - time.monotonic())
    except TimeoutError:
        process.send(signal.SIGKILL)
        return process.end()


def _as_a_shell_sees_it(code: int | None) -> int:
    assert code is not None
    return 128 - code if code < 0 else code


def judged(wanted: judge.Run, stopped: Stopped) -> list[str]:
    """What is wrong with a run; then it is removed."""
    told = []
    ended = stopped.stage == moments.ENDED
    expected = 0 if ended or all(code == 0 for code in stopped.codes) else 128 + stopped.number
    if set(stopped.codes) != {expected}:
        told.append(f"exit codes {stopped.codes}, not {expected}")
    if expected == 0 and not all("done; the run is in" in text for text in stopped.told[:1]):
        told.append("exit code 0, and it is not done")
    if any(TRACEBACK in text for text in stopped.told):
        told.append(f"a traceback: {stopped.told[0][-judge.SHORT :]}")
    told += [f"it does not go on: {error[-judge.SHORT :]}" for error in stopped.errors]
    if not stopped.errors:
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
            {"case": n, "stage": o.stage, "codes": o.codes, "after": o.after, "what": wrong[:5]}
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
        "sent the signal. Times are of a run whose steps take milliseconds.",
        "",
        *table(head, rows),
    ]
