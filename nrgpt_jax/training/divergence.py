"""Handling of non-finite updates and of loss spikes.

An update that is not finite is skipped (`step`). Too many in a row end the run: the batch of the
first one is saved, and the states that led to it are set aside, so that the same command with a
smaller learning rate resumes from a good state.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nrgpt_jax import disk
from nrgpt_jax.array_types import Batch
from nrgpt_jax.errors import UserError
from nrgpt_jax.processes import host0_first
from nrgpt_jax.runs.checkpoints import Checkpoints

FOLDER = "diverged"
_RETAINED = 0.9  # decay of the running mean per observed loss
_BEFORE = 5  # losses in the mean before one can be a spike
MOST_ROLLBACKS = 10


class Diverged(Exception):
    """The loss, the gradient or the state is not finite.

    Args:
      what: the message.
      first: the first step that is not finite.
      bad_from: the states after this step and later ones are bad.
    """

    def __init__(self, what: str, first: int, bad_from: int):
        super().__init__(what)
        self.first, self.bad_from = first, bad_from


class Spike(Exception):
    """The training loss has spiked."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the training loss leapt to {loss:.4g} at step {step}")
        self.step, self.loss = step, loss


class SpikeWatch:
    """A detector of losses that spike above their running mean.

    Args:
      factor: a loss above this multiple of the mean is a spike; 0: no detection.
      record: the `record()` in the checkpoint of a resumed run.
    """

    def __init__(self, factor: float, record: Mapping[str, Any] | None = None):
        self.factor = factor
        self.mean, self.count, self.rollbacks = 0.0, 0, 0
        self.armed = False  # whether there is a checkpoint to roll back to
        if record:
            self.mean, self.count, self.armed = record["mean"], record["count"], True

    def record(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        return {"mean": self.mean, "count": self.count}

    def went_back(self, record: Mapping[str, Any] | None) -> "SpikeWatch":
        """Return the watch of a run that has rolled back to a checkpoint with this record."""
        watch = SpikeWatch(self.factor, record)
        watch.rollbacks, watch.armed = self.rollbacks + 1, True
        return watch

    def see(self, step: int, loss: float) -> None:
        """Observe a loss. Raises Spike if it is one."""
        if not self.factor or not math.isfinite(loss):
            return
        if self.armed and self.count >= _BEFORE and loss > self.factor * self.mean:
            raise Spike(step, loss)
        retained = _RETAINED if self.count else 0.0
        self.mean, self.count = retained * self.mean + (1 - retained) * loss, self.count + 1


def save_batch(workdir: Path, step: int, batch: Batch) -> Path:
    """Write the batch of a step as `diverged/step_N.npz`: inputs, targets, weights (B,N)."""
    path = workdir / FOLDER / f"step_{step}.npz"
    content = io.BytesIO()
    arrays = {name: np.asarray(value) for name, value in batch._asdict().items()}
    np.savez_compressed(content, allow_pickle=False, step=np.array(step), **arrays)

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        disk.write_whole(path, content.getvalue())

    host0_first(write)
    return path


class RunDiverged(UserError):
    """A run has diverged and ended."""


def ended(error: Diverged, workdir: Path, batch: Batch, checkpoints: Checkpoints) -> RunDiverged:
    """Save the batch and set bad states aside; return the error that says how to resume."""
    saved = save_batch(workdir, error.first, batch)
    aside = checkpoints.set_aside(error.bad_from, workdir / FOLDER)
    left = checkpoints.whole_steps("latest")
    begin = f"from the checkpoint of step {left[-1]}" if left else "from the beginning"
    retained = f"; states that led to it are in {aside[0].parent}" if aside else ""
    return RunDiverged(
        f"the {error} (its batch is {saved}{retained}); lower "
        f"--config.optimizer.learning_rate and run the command again: it resumes {begin}"
    )
