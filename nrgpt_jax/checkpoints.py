"""The only place that knows how a run is saved.

`checkpoints/latest` keeps the last two complete states (parameters, optimizer, data iterator) to
resume from; `checkpoints/best` the parameters with the lowest validation loss. A save that was
killed leaves a temporary folder that is ignored; a damaged checkpoint is skipped with a warning.
"""

from pathlib import Path
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from nrgpt_jax.errors import UserError

_policies = ocp.training.preservation_policies
_KEPT = {"latest": 2, "best": 1}
KINDS = tuple(_KEPT)


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays: what a checkpoint is read into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


class Checkpoints:
    """Saves and restores one run. Use as a context manager."""

    def __init__(self, workdir: Path):
        self._root = workdir.absolute() / "checkpoints"
        self._of = {kind: self._open(kind, count) for kind, count in _KEPT.items()}

    def _open(self, kind: str, count: int) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self._root / kind,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.LatestN(count),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        for checkpointer in self._of.values():
            checkpointer.close()

    def save_latest(self, step: int, params: Any, optimizer: Any, data: Any) -> None:
        """Saves everything a run needs to go on after `step` steps."""
        if step not in self._steps("latest"):
            content = {"params": params, "optimizer": optimizer, "data": data}
            self._of["latest"].save_checkpointables(step, content, force=True)

    def save_best(self, step: int, params: Any, val_loss: float) -> None:
        """Saves parameters better than all before."""
        self._of["best"].save_checkpointables(
            step, {"params": params}, force=True, overwrite=True, metrics={"val/loss": val_loss}
        )

    def best_loss(self) -> float:
        """The validation loss of the best checkpoint, infinity when there is none."""
        best = self._of["best"].latest
        return best.metrics["val/loss"] if best and best.metrics else float("inf")

    def restore_latest(self, params: Any, optimizer: Any, data: Any) -> tuple[int, Any, Any] | None:
        """(step, parameters, optimizer state) of the newest readable state, or None.

        Args:
          params, optimizer: trees of the expected shapes and shardings.
          data: the grain iterator, set to its saved position.
        """
        wanted = {"params": abstract(params), "optimizer": abstract(optimizer), "data": data}
        found = self._newest_readable("latest", wanted)
        if found is None:
            return None
        step, content = found
        return step, content["params"], content["optimizer"]

    def restore_params(self, kind: str, params: Any) -> tuple[int, Any]:
        """(step, parameters) of the `best` or `latest` checkpoint. Raises UserError without.

        `params` is the tree of expected shapes and shardings.
        """
        found = self._newest_readable(kind, {"params": params})
        if found is None:
            raise UserError(f"no {kind} checkpoint in {self._root / kind}; train first")
        return found[0], found[1]["params"]

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
