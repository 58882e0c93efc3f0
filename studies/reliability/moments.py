"""When a run is hit: at any time, in a save, in an evaluation; and where it was, by its files."""

import glob
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from studies.programs import Running
from studies.reliability.judge import unfinished

TRAIN_STEPS, EVAL_EVERY, CHECKPOINT_EVERY = 20, 5, 3  # of the run that is disturbed
GLANCE = 0.001  # seconds between looks at a run directory
SAVE, EVALUATION = 0.12, 0.05  # seconds that one takes, about
AIMED, AT_SAVES = 0.5, 0.6  # shares: of moments that are aimed, and of those the ones at saves
ENDED = "had ended before"
STAGES = ("starting", "in a save", "in an evaluation", "in between", ENDED)
Moment = Callable[[Running, Path], None]  # waits in the process that disturbs


def stage(workdir: Path) -> str:
    """Where a run is or was, by what lies in its directory."""
    if any(name.startswith("checkpoints") for name in unfinished(workdir)):
        return "in a save"
    last = last_record(workdir)
    if not last:
        return "starting"
    due = last["step"] % EVAL_EVERY == 0 and "val/loss" not in last
    return "in an evaluation" if due else "in between"


def last_record(workdir: Path) -> dict[str, Any]:
    """The last complete line of metrics.jsonl; empty without one."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    return json.loads(complete[-1]) if complete else {}


def after(seconds: float, happened: Callable[[Path], object] = lambda workdir: True) -> Moment:
    """Some seconds after the program has begun, or after something has happened in its directory,
    which it looks for; early where the run ends before."""

    def wait(running: Running, workdir: Path) -> None:
        running.wait_until_it_begins()
        while not happened(workdir) and running.is_running():
            time.sleep(GLANCE)
        time.sleep(seconds)

    return wait


def after_step(step: int, seconds: float = 0.0) -> Moment:
    """After the loss of a step was written: in an evaluation, if one follows."""
    return after(seconds, lambda workdir: last_record(workdir).get("step", 0) >= step)


def in_save(step: int, seconds: float) -> Moment:
    """After a save at this step has begun."""
    return after(seconds, lambda workdir: glob.glob(f"checkpoints/*/{step}*", root_dir=workdir))


def drawn(random: np.random.Generator, seconds: float) -> Moment:
    """Uniform over the seconds that a whole run takes, or in one of its saves or evaluations."""
    evaluations = range(EVAL_EVERY, TRAIN_STEPS + 1, EVAL_EVERY)
    if random.random() >= AIMED:
        return after(random.uniform(0.0, seconds))
    if random.random() >= AT_SAVES:
        return after_step(int(random.choice(evaluations)), random.uniform(0.0, EVALUATION))
    saves = [*evaluations, *range(CHECKPOINT_EVERY, TRAIN_STEPS, CHECKPOINT_EVERY)]
    return in_save(int(random.choice(saves)), random.uniform(0.0, SAVE))
