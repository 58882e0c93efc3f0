"""The only place that knows how a run is saved.

`checkpoints/latest` keeps the last two complete states, with the place in the data, to resume
from; `checkpoints/best` the parameters with the lowest validation loss. A save that was
killed leaves a temporary folder that is ignored; a damaged checkpoint is skipped with a warning.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from orbax.checkpoint import v1 as ocp

from nrgpt_jax.errors import UserError

_policies = ocp.training.preservation_policies
_KEPT = {"latest": 2, "best": 1}
KINDS = tuple(_KEPT)


class Checkpoints:
    """Saves and restores one run. Use as a context manager.

    Only the process that trains opens it `writable`: that clears away what a killed save left.
    """

    def __init__(self, workdir: Path, *, writable: bool = False):
        self._writable = writable
        self._root = workdir.absolute() / "checkpoints"
        self._of = {kind: self._open(kind, count) for kind, count in _KEPT.items()}

    def _open(self, kind: str, count: int) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self._root / kind,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.LatestN(count),
            cleanup_tmp_directories=self._writable,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        for checkpointer in self._of.values():
            checkpointer.close()

    def save_latest(self, step: int, state: Any, place: Mapping[str, Any]) -> None:
        """Saves everything a run needs to go on after `step` steps: its whole state, and where in
        its course it is (numbers by name).

        The parameters stand apart, so that they can be read alone.
        """
        content = {"params": state.params, "rest": state.replace(params=None)}
        # Overwrites a damaged checkpoint of this step, from before the run fell back.
        self._of["latest"].save_checkpointables(
            step,
            content,
            force=True,
            overwrite=True,
            custom_metadata=dict(place),
        )

    def save_best(self, step: int, params: Any, val_loss: float) -> None:
        """Saves parameters better than all before."""
        self._of["best"].save_checkpointables(
            step, {"params": params}, force=True, overwrite=True, metrics={"val/loss": val_loss}
        )

    def best_loss(self) -> float:
        """The validation loss of the best checkpoint, infinity when there is none."""
        best = self._of["best"].latest
        loss = best.metrics["val/loss"] if best and best.metrics else math.inf
        return math.inf if math.isnan(loss) else loss

    def has(self, kind: str) -> bool:
        """Whether there is a `best` or `latest` checkpoint."""
        return bool(self._steps(kind))

    def restore_latest(self, state: Any) -> tuple[Any, Mapping[str, Any]] | None:
        """The newest readable state and its place (empty in older checkpoints), or None.

        `state` is the tree of expected shapes and shardings.
        """
        wanted = {"params": state.params, "rest": state.replace(params=None)}
        found = self._newest_readable("latest", wanted)
        if found is None:
            return None
        step, content = found
        place = self._of["latest"].checkpointables_metadata(step).custom_metadata or {}
        return content["rest"].replace(params=content["params"]), place

    def restore_params(self, kind: str, params: Any) -> tuple[int, Any]:
        """(step, parameters) of the `best` or `latest` checkpoint. Raises UserError without.

        `params` is the tree of expected shapes and shardings.
        """
        found = self._newest_readable(kind, {"params": params})
        if found is None:
            others = [f"--checkpoint={other}" for other in KINDS if self.has(other)]
            cure = f"use {others[0]}" if others else "train first"
            raise UserError(f"no {kind} checkpoint in {self._root / kind}; {cure}")
        return found[0], found[1]["params"]

    def restore_as_saved(self) -> tuple[int, Any, float]:
        """(step, parameters, validation loss) of the best checkpoint, or else of the latest.

        Whatever the parameters are called. Raises UserError where there is none.
        """
        kind = "best" if self.has("best") else "latest"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of orbax: it is read onto the devices it came from
            return *self.restore_params(kind, None), self.best_loss()

    def _steps(self, kind: str) -> list[int]:
        return [checkpoint.step for checkpoint in self._of[kind].checkpoints]

    def _newest_readable(self, kind: str, wanted: dict[str, Any]):
        steps = sorted(self._steps(kind), reverse=True)
        for step in steps:
            try:
                return step, self._of[kind].load_checkpointables(step, wanted)
            except Exception as error:  # orbax, tensorstore and grain each raise their own
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logging.warning("checkpoint %s/%d cannot be read: %.200s", kind, step, reason)
        if steps:
            raise UserError(
                f"no readable {kind} checkpoint in {self._root / kind} (tried steps {steps}); "
                "restore one from a copy, or train again in an empty folder"
            )
        return None
