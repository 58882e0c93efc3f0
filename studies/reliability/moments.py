"""Moments of disturbances (any time, in a save, in an evaluation), and stages of a run."""

import glob
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from studies.programs import Running
from studies.reliability.judge import unfinished

TRAIN_STEPS, EVAL_EVERY, CHECKPOINT_EVERY = 20, 5, 3  # of the disturbed run
GLANCE = 0.001  # seconds between polls of a run directory
SAVE, EVALUATION = 0.12, 0.05  # approximate seconds of a save and of an evaluation
AIMED, AT_SAVES = 0.5, 0.6  # share of aimed moments; share of saves among them
ENDED = "had ended before"
STAGES = ("starting", "in a save", "in an evaluation", "in between", ENDED)
Moment = Callable[[Running, Path], None]  # waits, in the disturbing process


def stage(workdir: Path) -> str:
    """Return the stage of a run, by the content of its directory."""
    if any(name.startswith("checkpoints") for name in unfinished(workdir)):
        return "in a save"
    last = last_record(workdir)
    if not last:
        return "starting"
    due = last["step"] % EVAL_EVERY == 0 and "val/loss" not in last
    return "in an evaluation" if due else "in between"


def last_record(workdir: Path) -> dict[str, Any]:
    """Return the last complete record of metrics.jsonl; empty if there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    return json.loads(complete[-1]) if complete else {}


def after(seconds: float, happened: Callable[[Path], object] = lambda workdir: True) -> Moment:
    """Return a moment some seconds after the program begins and `happened` is true of its run
    directory, which is polled; the poll ends early if the run ends."""

    def wait(running: Running, workdir: Path) -> None:
        running.wait_until_it_begins()
        while not happened(workdir) and running.is_running():
            time.sleep(GLANCE)
        time.sleep(seconds)

    return wait


def after_step(step: int, seconds: float = 0.0) -> Moment:
    """Return a moment after the loss of a step is written: in an evaluation, if one follows."""
    return after(seconds, lambda workdir: last_record(workdir).get("step", 0) >= step)


def in_save(step: int, seconds: float) -> Moment:
    """Return a moment after a save at this step begins."""
    return after(seconds, lambda workdir: glob.glob(f"checkpoints/*/{step}*", root_dir=workdir))


def drawn(random: np.random.Generator, seconds: float) -> Moment:
    """Draw a moment: uniform over the duration of a run, or in one of its saves or evaluations."""
    evaluations = range(EVAL_EVERY, TRAIN_STEPS + 1, EVAL_EVERY)
    if random.random() >= AIMED:
        return after(random.uniform(0.0, seconds))
    if random.random() >= AT_SAVES:
        return after_step(int(random.choice(evaluations)), random.uniform(0.0, EVALUATION))
    saves = [*evaluations, *range(CHECKPOINT_EVERY, TRAIN_STEPS, CHECKPOINT_EVERY)]
    return in_save(int(random.choice(saves)), random.uniform(0.0, SAVE))
