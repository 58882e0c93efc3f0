"""The only place that knows how a run is saved.

`checkpoints/latest` keeps the last complete states, with the place in the data, to resume from;
`checkpoints/best` the parameters with the lowest validation loss. A checkpoint is a folder of
orbax, named by its step, with a `checksums.json` of all its files: it is made under another name,
so that a save that was killed leaves nothing that could be taken for one. On a bucket, where
nothing can be renamed, `checksums.json` is written last, and a folder without it is no checkpoint.
What is read was verified before; a damaged checkpoint is skipped with a warning.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from absl import logging
from orbax.checkpoint import v1 as ocp

from nrgpt_jax import disk, paths
from nrgpt_jax.errors import UserError
from nrgpt_jax.processes import gather_texts, host0_first, is_first, raise_on_all_hosts
from nrgpt_jax.runs import checksums
from nrgpt_jax.runs.orbax_errors import failure, reason

KINDS = ("latest", "best")
_REPLACED = ".replaced"  # of a checkpoint that gives way to another one of its step
_NOT_USED = "checkpoint %s/%d is not used: %s"


class Checkpoints:
    """Saves and restores one run. It may be used as a context manager, and need not be closed.

    Only the process that trains opens it `writable`: that clears away what a killed save left.

    Args:
      workdir: the run directory.
      writable: whether it will be written.
      keep: how many of the last states are kept.
      keep_every: states of steps that this divides are kept for good; 0: none.
    """

    def __init__(
        self, workdir: Path, *, writable: bool = False, keep: int = 2, keep_every: int = 0
    ):
        self._root = paths.absolute(workdir) / "checkpoints"
        self._renames = not paths.on_bucket(workdir)
        self._keep, self._keep_every = keep, keep_every
        self._verified: dict[tuple[str, int], str] = {}  # what is wrong with them
        self._believed = False
        if writable:
            host0_first(self._clear)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        """Nothing is open: a save is over when it returns."""

    def _clear(self) -> None:
        for kind in KINDS:
            folder = self._root / kind
            for entry in folder.iterdir() if folder.is_dir() else ():
                name = entry.name.removesuffix(_REPLACED)
                if not self._renames and not checksums.exist(entry):
                    paths.discard(entry)
                elif name.isdigit() and name != entry.name and not (folder / name).exists():
                    entry.rename(folder / name)  # it was to give way to what never came
                elif not entry.name.isdigit() and entry.is_dir():
                    paths.discard(entry)

    # Saving -------------------------------------------------------------------------------------

    def save_latest(
        self, step: int, state: Any, place: Mapping[str, Any], *, prune: bool = True
    ) -> None:
        """Saves everything that a run needs to resume after `step` steps.

        That is its whole state, and its place in the data and the course (numbers by name). The
        parameters stand apart, so that they can be read alone. With `prune`, states that are
        no longer to be kept are removed.

        Raises:
          OSError: it could not be saved; what was saved before is still there.
        """
        self._save("latest", step, parts_of(state), place)
        if prune:
            host0_first(lambda: self._prune(step))

    def save_best(self, step: int, params: Any, val_loss: float, *, prune: bool = True) -> None:
        """Saves parameters better than all before; arguments and errors are of `save_latest`."""
        self._save("best", step, {"params": params}, {"val_loss": val_loss})
        if prune:
            host0_first(lambda: self._prune(step))

    def _save(self, kind: str, step: int, content: dict, metadata: Mapping[str, Any]) -> None:
        folder = self._root / kind
        final = folder / str(step)
        partial = folder / f"{step}.partial" if self._renames else final

        def save() -> None:
            write = functools.partial(ocp.save_checkpointables, partial, content, overwrite=True)
            raise_on_all_hosts(lambda: write(custom_metadata=dict(metadata)))
            checksums.write(partial)
            if self._renames:
                host0_first(lambda: _move(partial, final))

        failed = failure(save)
        if failed:
            for left in folder.glob(f"{step}.partial*"):  # orbax's own temporary folders too
                paths.discard(left)
            raise OSError(
                f"the {kind} checkpoint of step {step} cannot be saved in {folder} ({failed}); the "
                "ones before it are whole"
            )
        self._verified[kind, step] = ""

    def _prune(self, step: int) -> None:
        """Removes states up to a step that are not to be kept, and what was best before them.

        Later ones are of a course that a damaged state has ended; they are of no use as others.
        """
        latest, best = ([s for s in self._listed(kind) if s <= step] for kind in KINDS)
        forever = {s for s in latest if self._keep_every and s % self._keep_every == 0}
        retained = {*latest[-self._keep :], *forever}
        # Whichever state the run may go back to, the best parameters up to it are still there.
        needed = {max((b for b in best if b <= s), default=None) for s in retained}
        needed |= set(best[-1:])
        for kind, result, wanted in (("latest", latest, retained), ("best", best, needed)):
            for other in set(result) - wanted:
                paths.discard(self._root / kind / str(other))

    def drop_best_after(self, step: int) -> None:
        """Removes what was best in a course that the run has left by going back to `step`."""

        def drop() -> None:
            for later in self._listed("best"):
                if later > step:
                    paths.remove(self._root / "best" / str(later))

        host0_first(drop)

    def set_aside(self, first: int, folder: Path) -> list[Path]:
        """Moves the states of step `first` and later to a folder; returns where they are."""
        moved = [(s, folder / f"checkpoint_{s}") for s in self.steps("latest") if s >= first]

        def move() -> None:
            for step, target in moved:
                paths.remove(target)
                paths.move(self._root / "latest" / str(step), target)

        host0_first(move)
        return [target for _, target in moved]

    # Reading ------------------------------------------------------------------------------------

    def steps(self, kind: str) -> list[int]:
        """The steps of the checkpoints that the first process sees, from the first to the last."""
        return json.loads(gather_texts(json.dumps(self._listed(kind)) if is_first() else "")[0])

    def whole_steps(self, kind: str) -> list[int]:
        """Those of checkpoints that are not damaged."""
        return [step for step in self.steps(kind) if not self._damage(kind, step)]

    def _listed(self, kind: str) -> list[int]:
        folder = self._root / kind
        entries = [e for e in folder.iterdir() if e.is_dir()] if folder.is_dir() else []
        whole = [e.name for e in entries if self._renames or checksums.exist(e)]
        return sorted(int(name) for name in whole if name.isdigit() and name.isascii())

    def has(self, kind: str) -> bool:
        """Whether there is a `best` or `latest` checkpoint."""
        return bool(self.steps(kind))

    def best_loss(self) -> float:
        """The validation loss of the best checkpoint that is whole, infinity without one."""
        for step in reversed(self.steps("best")):
            if not self._damage("best", step):
                loss = self._loss(step)
                return math.inf if math.isnan(loss) else loss
        return math.inf

    def restore_latest(self, state: Any) -> tuple[Any, Mapping[str, Any]] | None:
        """The newest whole state and its place (empty in older checkpoints), or None.

        `state` is the tree of expected shapes and shardings.
        """
        result = self._newest_whole("latest", parts_of(state))
        if result is None:
            return None
        step, content = result
        rest = content["rest"]
        state = state.replace(
            params=content["params"], step=rest["step"], optimizer=rest["optimizer"]
        )
        return state, self._metadata("latest", step)

    def restore_params(self, kind: str, params: Any) -> tuple[int, Any]:
        """(step, parameters) of the `best` or `latest` checkpoint. Raises UserError without.

        `params` is the tree of expected shapes and shardings.
        """
        result = self._newest_whole(kind, {"params": params})
        if result is None:
            raise UserError(f"no {kind} checkpoint in {self._root / kind}; {self._others(kind)}")
        return result[0], result[1]["params"]

    def _others(self, kind: str) -> str:
        others = [f"--checkpoint={other}" for other in KINDS if other != kind and self.has(other)]
        return f"use {others[0]}" if others else "train first"

    def _newest_whole(self, kind: str, wanted: dict[str, Any]):
        steps = self.steps(kind)
        for step in reversed(steps):
            if self._damage(kind, step):
                continue
            try:
                folder = self._root / kind / str(step)
                content = raise_on_all_hosts(
                    functools.partial(ocp.load_checkpointables, folder, wanted)
                )
            except Exception as error:  # orbax, tensorstore and grain each raise their own
                if not self._renames:  # its files were verified: a bucket was not reached
                    raise OSError(f"{folder} cannot be read now ({reason(error)})") from None
                logging.warning(_NOT_USED, kind, step, reason(error))
                continue
            if all_finite(content):
                return step, content
            logging.warning(_NOT_USED, kind, step, "it holds numbers that are not finite")
        if steps:
            raise UserError(
                f"no readable {kind} checkpoint in {self._root / kind} (tried steps {steps}); "
                f"restore one from a copy, or {self._others(kind)}"
            )
        return None

    def _damage(self, kind: str, step: int) -> str:
        """What is wrong with a checkpoint's files, said once; "" where nothing is."""
        if (kind, step) not in self._verified:
            folder = self._root / kind / str(step)
            if not self._believed and not checksums.exist(folder):
                text = "%s has no checksums, as checkpoints of older versions: it is not verified"
                logging.warning(text, folder)
                self._believed = True  # says it once
            damage = self._verified[kind, step] = checksums.damage(folder)
            if damage:
                logging.warning(_NOT_USED, kind, step, damage)
        return self._verified[kind, step]

    def _metadata(self, kind: str, step: int) -> Mapping[str, Any]:
        result = ocp.checkpointables_metadata(self._root / kind / str(step)).custom_metadata
        return result if isinstance(result, Mapping) else {}

    def _loss(self, step: int) -> float:
        """The validation loss of a best checkpoint; not a number where it is not known."""
        loss = self._metadata("best", step).get("val_loss")
        if loss is None:  # of an older version
            file = self._root / "best" / str(step) / "metrics" / "metrics"
            try:
                loss = msgspec.json.decode(file.read_bytes(), type=dict[str, float])["val/loss"]
            except (OSError, KeyError, ValueError):
                logging.warning("%s cannot be read: its loss is not known", file)
                loss = math.nan
        return float(loss)


def parts_of(state: Any) -> dict[str, Any]:
    """A state as it is saved."""
    rest = {"step": state.step, "params": None, "optimizer": state.optimizer}
    return {"params": state.params, "rest": rest}


def _move(partial: Path, final: Path) -> None:
    """Gives a checkpoint its name; a damaged one that has it gives way."""
    replaced = final.with_name(f"{final.name}{_REPLACED}")
    if final.exists():
        paths.discard(replaced)
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    disk.flush_folder(final.parent)
    paths.discard(replaced)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every array is finite, () bool."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
