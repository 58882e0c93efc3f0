"""Checkpoints of a run; only this module knows their format.

`checkpoints/latest` holds the last complete states, with the place in the data, to resume from;
`checkpoints/best` holds the parameters with the lowest validation loss. A checkpoint is an orbax
folder, named by its step, with a `checksums.json` of all its files. It is written under another
name and then renamed, so a killed save leaves no invalid checkpoint. A bucket cannot rename: there
`checksums.json` is written last, and a folder without it is no checkpoint.
Files are verified before they are read; a damaged checkpoint is skipped with a warning.
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
_REPLACED = ".replaced"  # suffix of a checkpoint that another one of its step replaces
_NOT_USED = "checkpoint %s/%d is not used: %s"


class Checkpoints:
    """The checkpoints of one run. It may be used as a context manager, and need not be closed.

    Only the training process opens it `writable`, which removes the remains of a killed save.

    Args:
      workdir: the run directory.
      writable: whether checkpoints will be saved.
      keep: the number of last states to keep.
      keep_every: states of steps that are a multiple of this are kept permanently; 0: none.
    """

    def __init__(
        self, workdir: Path, *, writable: bool = False, keep: int = 2, keep_every: int = 0
    ):
        self._root = paths.absolute(workdir) / "checkpoints"
        self._renames = not paths.on_bucket(workdir)
        self._keep, self._keep_every = keep, keep_every
        self._verified: dict[tuple[str, int], str] = {}  # the damage of each, "" for none
        self._believed = False
        if writable:
            host0_first(self._clear)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        """Do nothing: a save is complete when it returns."""

    def _clear(self) -> None:
        for kind in KINDS:
            folder = self._root / kind
            for entry in folder.iterdir() if folder.is_dir() else ():
                name = entry.name.removesuffix(_REPLACED)
                if not self._renames and not checksums.exist(entry):
                    paths.discard(entry)
                elif name.isdigit() and name != entry.name and not (folder / name).exists():
                    entry.rename(folder / name)  # its replacement was not completed
                elif not entry.name.isdigit() and entry.is_dir():
                    paths.discard(entry)

    # Saving -------------------------------------------------------------------------------------

    def save_latest(
        self, step: int, state: Any, place: Mapping[str, Any], *, prune: bool = True
    ) -> None:
        """Save everything that a run needs to resume after `step` steps.

        That is its whole state and `place`, its position in the data and the run (values by name).
        Parameters are stored separately, so that they can be read alone. With `prune`, states that
        are no longer to be kept are removed.

        Raises:
          OSError: the checkpoint could not be saved; earlier ones remain valid.
        """
        self._save("latest", step, parts_of(state), place)
        if prune:
            host0_first(lambda: self._prune(step))

    def save_best(self, step: int, params: Any, val_loss: float, *, prune: bool = True) -> None:
        """Save the best parameters so far; arguments and errors are as in `save_latest`."""
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
        """Remove states up to a step that are not to be kept, and best parameters before them.

        Later states do not count as kept: their course has ended in a damaged state.
        """
        latest, best = ([s for s in self._listed(kind) if s <= step] for kind in KINDS)
        forever = {s for s in latest if self._keep_every and s % self._keep_every == 0}
        retained = {*latest[-self._keep :], *forever}
        # For every state that the run may return to, keep the best parameters up to it.
        needed = {max((b for b in best if b <= s), default=None) for s in retained}
        needed |= set(best[-1:])
        for kind, result, wanted in (("latest", latest, retained), ("best", best, needed)):
            for other in set(result) - wanted:
                paths.discard(self._root / kind / str(other))

    def drop_best_after(self, step: int) -> None:
        """Remove best parameters of steps after `step`, to which the run has returned."""

        def drop() -> None:
            for later in self._listed("best"):
                if later > step:
                    paths.remove(self._root / "best" / str(later))

        host0_first(drop)

    def set_aside(self, first: int, folder: Path) -> list[Path]:
        """Move the states of step `first` and later to a folder; return their new paths."""
        moved = [(s, folder / f"checkpoint_{s}") for s in self.steps("latest") if s >= first]

        def move() -> None:
            for step, target in moved:
                paths.remove(target)
                paths.move(self._root / "latest" / str(step), target)

        host0_first(move)
        return [target for _, target in moved]

    # Reading ------------------------------------------------------------------------------------

    def steps(self, kind: str) -> list[int]:
        """Return the steps of the checkpoints that the first process sees, in ascending order."""
        return json.loads(gather_texts(json.dumps(self._listed(kind)) if is_first() else "")[0])

    def whole_steps(self, kind: str) -> list[int]:
        """Return the steps of undamaged checkpoints."""
        return [step for step in self.steps(kind) if not self._damage(kind, step)]

    def _listed(self, kind: str) -> list[int]:
        folder = self._root / kind
        entries = [e for e in folder.iterdir() if e.is_dir()] if folder.is_dir() else []
        whole = [e.name for e in entries if self._renames or checksums.exist(e)]
        return sorted(int(name) for name in whole if name.isdigit() and name.isascii())

    def has(self, kind: str) -> bool:
        """Return whether there is a checkpoint of the kind `best` or `latest`."""
        return bool(self.steps(kind))

    def best_loss(self) -> float:
        """Return the validation loss of the last undamaged best checkpoint; infinity if none."""
        for step in reversed(self.steps("best")):
            if not self._damage("best", step):
                loss = self._loss(step)
                return math.inf if math.isnan(loss) else loss
        return math.inf

    def restore_latest(self, state: Any) -> tuple[Any, Mapping[str, Any]] | None:
        """Restore the newest undamaged state and its place (empty in older checkpoints), or None.

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
        """Restore (step, parameters) of the newest checkpoint of a kind. Raises UserError if none.

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
            except Exception as error:  # orbax, tensorstore and grain raise their own types
                if not self._renames:  # files are verified, so the bucket is unreachable
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
        """Return the damage of a checkpoint's files, "" for none; warn about it once."""
        if (kind, step) not in self._verified:
            folder = self._root / kind / str(step)
            if not self._believed and not checksums.exist(folder):
                text = "%s has no checksums, as checkpoints of older versions: it is not verified"
                logging.warning(text, folder)
                self._believed = True  # warn once
            damage = self._verified[kind, step] = checksums.damage(folder)
            if damage:
                logging.warning(_NOT_USED, kind, step, damage)
        return self._verified[kind, step]

    def _metadata(self, kind: str, step: int) -> Mapping[str, Any]:
        result = ocp.checkpointables_metadata(self._root / kind / str(step)).custom_metadata
        return result if isinstance(result, Mapping) else {}

    def _loss(self, step: int) -> float:
        """Return the validation loss of a best checkpoint; NaN if it is unknown."""
        loss = self._metadata("best", step).get("val_loss")
        if loss is None:  # a checkpoint of an older version
            file = self._root / "best" / str(step) / "metrics" / "metrics"
            try:
                loss = msgspec.json.decode(file.read_bytes(), type=dict[str, float])["val/loss"]
            except (OSError, KeyError, ValueError):
                logging.warning("%s cannot be read: its loss is not known", file)
                loss = math.nan
        return float(loss)


def parts_of(state: Any) -> dict[str, Any]:
    """Return a state in the form in which it is saved."""
    rest = {"step": state.step, "params": None, "optimizer": state.optimizer}
    return {"params": state.params, "rest": rest}


def _move(partial: Path, final: Path) -> None:
    """Rename a complete checkpoint, replacing a damaged one of that name."""
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
    """Return whether every entry of every array is finite, () bool."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
