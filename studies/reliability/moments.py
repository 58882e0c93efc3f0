"""When a run is hit: at any time, in a save, in an evaluation; and where it was then, by its files.

A moment waits in the process that disturbs, while the run goes on; it returns early where the run
ends before.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from studies.programs import Running
from studies.reliability.judge import KINDS, unfinished
from studies.reliability.tiny import CHECKPOINT_EVERY, EVAL_EVERY, TRAIN_STEPS

GLANCE = 0.001  # seconds between looks at a run directory
SAVE, EVALUATION = 0.12, 0.05  # seconds that one takes, about
AIMED = 0.5  # share of moments that are aimed at saves and evaluations
Moment = Callable[[Running, Path], None]

BEFORE = "before config.json"  # starting, compiling the step
STARTING = "before the first metrics"
SAVING = "in a save"
EVALUATING = "in an evaluation"
BETWEEN = "in between"
ENDED = "after its end"
STAGES = (BEFORE, STARTING, SAVING, EVALUATING, BETWEEN, ENDED)


def at(seconds: float) -> Moment:
    """So many seconds after the program has begun."""

    def wait(running: Running, workdir: Path) -> None:
        del workdir
        end = running.wait_until_it_begins() + seconds
        _until(running, lambda: time.monotonic() >= end)

    return wait


def in_save(number: int, seconds: float) -> Moment:
    """So many seconds after the save of this number has begun."""

    def wait(running: Running, workdir: Path) -> None:
        seen: set[str] = set(unfinished(workdir))
        count = 0

        def begun() -> bool:
            nonlocal count
            new = set(_unfinished(workdir)) - seen
            count += bool(new)
            seen.update(new)
            return count >= number

        _until(running, begun)
        time.sleep(seconds)

    return wait


def in_evaluation(step: int, seconds: float) -> Moment:
    """So many seconds after the loss of the step before an evaluation was written."""

    def wait(running: Running, workdir: Path) -> None:
        _until(running, lambda: (_last(workdir) or {}).get("step", 0) >= step)
        time.sleep(seconds)

    return wait


def drawn(random: np.random.Generator, wall: float) -> Moment:
    """Uniform over the time that a whole run takes, or in one of its saves or evaluations."""
    if random.random() >= AIMED:
        return at(random.uniform(0.0, wall))
    if random.random() < 0.6:
        saves = TRAIN_STEPS // CHECKPOINT_EVERY + TRAIN_STEPS // EVAL_EVERY
        return in_save(int(random.integers(1, saves + 1)), random.uniform(0.0, SAVE))
    step = random.choice(range(EVAL_EVERY, TRAIN_STEPS + 1, EVAL_EVERY))
    return in_evaluation(int(step), random.uniform(0.0, EVALUATION))


def stage(workdir: Path) -> str:
    """Where a run is or was, by what lies in its directory."""
    if not (workdir / "config.json").exists():
        return BEFORE
    if _unfinished(workdir):
        return SAVING
    last = _last(workdir)
    if last is None:
        return STARTING
    due = last["step"] % EVAL_EVERY == 0 and "val/loss" not in last
    return EVALUATING if due else BETWEEN


def _unfinished(workdir: Path) -> list[str]:
    """Of saves of checkpoints; the folder changes while it is looked at."""
    try:
        return [name for name in unfinished(workdir) if name.startswith(KINDS)]
    except FileNotFoundError:
        return []


def _last(workdir: Path) -> dict | None:
    """The last whole line of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1]) if whole else None


def _until(running: Running, happened: Callable[[], bool]) -> None:
    while not happened() and running.is_running():
        time.sleep(GLANCE)
