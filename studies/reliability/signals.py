"""Runs that are killed or stopped by a signal at any moment, and resumed."""

import itertools
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np

from studies.reliability import runs
from studies.reliability.moments import drawn
from studies.reliability.report import Part
from studies.reliability.runs import RESUMED, Case, Disturbance, Whole, undisturbed

MOST_KILLS = 3
COLD_KILLS, COLD_STOPS = 0.2, 0.5  # shares of runs without a compilation cache


def run_kills(cases: int, seed: int, jobs: int) -> dict[str, Any]:
    """Killed and restarted.

    As documented: restarted until it is done, a killed run ends bit-identical to an undisturbed
    one. Parameters, optimizer state, step, data position, the best checkpoint with its loss, and
    metrics.jsonl are compared, except for values that a clock decides. No partial checkpoint
    remains. The columns count the states in which kills hit the runs, by the content of the run
    directory.
    """
    with undisturbed() as whole:
        return runs.counted(runs.run_all(whole, killed(whole, cases, seed), jobs=jobs))


def killed(whole: Whole, cases: int, seed: int) -> Iterator[Case]:
    """Yield runs that receive SIGKILL, one to three times each."""
    hit = Disturbance({0, 128 + signal.SIGKILL}, act=runs.send(signal.SIGKILL))
    for case in range(cases):
        random = np.random.default_rng([seed, case])
        cold = random.random() < COLD_KILLS
        seconds = whole.cold if cold else whole.warm
        times = range(random.integers(1, MOST_KILLS + 1))
        kills = [hit._replace(when=drawn(random, seconds)) for _ in times]
        yield Case("SIGKILL, up to three times", [*kills, RESUMED], cold=cold, all_steps=True)


def run_stops(cases: int, seed: int, jobs: int) -> dict[str, Any]:
    """Stopped by a signal.

    As documented: all processes exit with code 143 (SIGTERM) or 130 (SIGINT) without a traceback,
    and the resumed run ends bit-identical to an undisturbed one. With two processes one receives
    the signal, and both may exit with 143. A training step takes milliseconds here.
    """
    results: list[runs.Result] = []
    for processes in (1, 2):
        with undisturbed(processes) as whole:
            at_a_time = max(jobs // processes, 1)
            results += runs.run_all(whole, stopped(whole, cases, seed), jobs=at_a_time)
    return runs.counted(results, timed=True)


def stopped(whole: Whole, cases: int, seed: int) -> Iterator[Case]:
    """Yield runs of which one process receives SIGTERM or SIGINT."""
    count = whole.processes
    for number, case in itertools.product((signal.SIGTERM, signal.SIGINT), range(cases)):
        # The processes of a run notify each other by SIGTERM, whichever signal one received.
        codes = {0, 128 + number, *([128 + signal.SIGTERM] if count > 1 else [])}
        random = np.random.default_rng([seed, number, count, case])
        cold = random.random() < COLD_STOPS
        moment = drawn(random, whole.cold if cold else whole.warm)
        which = int(random.integers(count))
        hit = Disturbance(codes, when=moment, act=runs.send(number), process=which)
        name = f"{number.name}, {count} process{'es' if count > 1 else ''}"
        yield Case(name, [hit, RESUMED], cold=cold)


KILLS, STOPS = Part("runs were sent", 100, run_kills), Part("signal to", 20, run_stops)
