"""Runs that are killed at any moment and started again end as if they had been left alone.

SIGKILL, one to three times a run: at a time drawn from all of the run's, or aimed into saves and
evaluations. A fifth of the runs compile everything anew, so that kills in compilation happen.
"""

import collections
import shutil
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.reliability import endings, judge, moments
from studies.reliability.tiny import Whole, undisturbed
from studies.tables import table

TITLE, CASES = "Killed and started again", 100
COLD = 0.2  # share of runs that compile anew
MOST_KILLS = 3


class Killed(NamedTuple):
    """A run that was killed and went on to its end."""

    workdir: Path
    stages: list[str]  # where each kill hit it
    errors: list[str]  # of starts that failed without having been killed
    leftovers: list[str]  # of saves that were cut short, that nothing has cleared away


def run(cases: int = CASES, seed: int = 0, jobs: int = 2) -> dict[str, Any]:
    """Kills so many runs. Returns counts and what differs."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        whole = undisturbed(Path(name))
        wanted = judge.read(whole.workdir)
        killed = pool.map(lambda case: kill(whole, Path(name), case, seed), range(cases))
        return counted([(one, judged(wanted, one)) for one in killed])


def kill(whole: Whole, folder: Path, case: int, seed: int) -> Killed:
    """One run, killed, and started again until its end."""
    random = np.random.default_rng([seed, case])
    workdir = folder / f"killed{case}"
    cold = random.random() < COLD
    if not cold:
        whole.lend_cache(workdir)
    wall = whole.cold if cold else whole.warm
    stages = [
        _killed(whole, workdir, moments.drawn(random, wall))
        for _ in range(random.integers(1, MOST_KILLS + 1))
    ]
    done = [endings.end(process) for process in whole.start(workdir)]
    errors = [d.stderr for d in done if d.returncode != 0]
    return Killed(workdir, stages, errors, judge.unfinished(workdir))


def _killed(whole: Whole, workdir: Path, moment: moments.Moment) -> str:
    (process,) = whole.start(workdir)
    moment(process, workdir)
    process.send(signal.SIGKILL)
    if process.end().returncode != -signal.SIGKILL:
        return moments.ENDED
    return moments.stage(workdir)


def judged(wanted: judge.Run, killed: Killed) -> list[str]:
    """What is wrong with a run, compared with the one that was left alone; then it is removed."""
    if killed.errors:
        return [f"it does not go on: {error[-judge.SHORT :]}" for error in killed.errors]
    found = judge.differences(wanted, judge.read(killed.workdir))
    shutil.rmtree(killed.workdir)
    return found


def counted(results: list[tuple[Killed, list[str]]]) -> dict[str, Any]:
    """The figures."""
    stages = collections.Counter(stage for one, _ in results for stage in one.stages)
    return {
        "runs": len(results),
        "never_killed": sum(set(one.stages) <= {moments.ENDED} for one, _ in results),
        "kills": sum(stages.values()) - stages[moments.ENDED],
        "stages": {stage: stages[stage] for stage in moments.STAGES if stage != moments.ENDED},
        "equal": sum(not wrong for _, wrong in results),
        "leftovers": sum(bool(one.leftovers) for one, _ in results),
        "wrong": [
            {"case": case, "stages": one.stages, "what": wrong[:5]}
            for case, (one, wrong) in enumerate(results)
            if wrong
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    rows = [[stage, count] for stage, count in found["stages"].items()]
    return [
        f"{found['runs']} runs were killed {found['kills']} times in all and started again until "
        f"they were done. **{found['equal']} of {found['runs']}** ended bit by bit as the run that "
        "was left alone: parameters, optimizer, step, place in the data, best checkpoint with its "
        "loss, and metrics.jsonl but for what a clock decides. Where kills hit, by what lay in the "
        "run directory:",
        "",
        *table(["the run was", "kills"], rows),
        "",
        f"Runs in which something of a save that was cut short was left behind: "
        f"{found['leftovers']}.",
    ]
