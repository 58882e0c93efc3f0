"""Trained models in one folder: model.safetensors, config.json, tokenizer.json.

A run directory opens in the same way. `nrgpt_jax.export` writes such folders.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from nrgpt_jax.array_types import Variables
from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import LanguageModel, abstract_params, create_model, parameter_specs, sharding
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import open_run, record_run

WEIGHTS_FILE = "model.safetensors"


class Pretrained(NamedTuple):
    """A model and everything that its use needs."""

    model: LanguageModel
    variables: Variables
    tokenizer: Tokenizer
    config: ConfigDict


def load_pretrained(folder: Path | str, checkpoint: str = "best") -> Pretrained:
    """Opens a run directory, or a folder of `save_pretrained`.

    Args:
      folder: where it is.
      checkpoint: of a run directory, `best` or `latest`.

    Raises:
      UserError: something is missing or damaged; the message names it.
    """
    folder = Path(folder)
    config, tokenizer = open_run(folder)
    model = create_model(config)
    if (folder / WEIGHTS_FILE).exists():
        params = _read_weights(folder / WEIGHTS_FILE, model)
    else:
        params = read_params(folder, checkpoint, model)[1]
    return Pretrained(model, {"params": params}, tokenizer, config)


def read_params(workdir: Path | str, checkpoint: str, model: LanguageModel) -> tuple[int, Any]:
    """(step, parameters) of a run's `best` or `latest` checkpoint. Raises UserError without."""
    where = sharding.parameter_shardings(parameter_specs(model), sharding.make_mesh())
    with Checkpoints(Path(workdir)) as checkpoints:
        wanted = sharding.abstract(abstract_params(model), where)
        return checkpoints.restore_params(checkpoint, wanted)


def save_pretrained(folder: Path | str, pretrained: Pretrained) -> None:
    """Writes a folder for `load_pretrained`; parameters are bit by bit the same there.

    Raises:
      UserError: the folder holds checkpoints of a run.
    """
    folder = Path(folder)
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} is a run directory; name another folder")
    flat = traverse_util.flatten_dict(pretrained.variables["params"], sep="/")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS_FILE}.partial"
    safetensors.save_file({k: np.array(v, order="C") for k, v in flat.items()}, partial)
    os.replace(partial, folder / WEIGHTS_FILE)
    record_run(folder, pretrained.config, pretrained.tokenizer)


def _read_weights(path: Path, model: LanguageModel):
    try:
        found = safetensors.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); export the run again") from None
    wanted = traverse_util.flatten_dict(abstract_params(model), sep="/")
    for name in sorted(set(wanted) | set(found)):
        there = found[name].shape if name in found else "absent"
        here = wanted[name].shape if name in wanted else "absent"
        if there != here:
            raise UserError(f"{path} is of another model: parameter {name}: {there}, not {here}")
    return traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in found.items()}, sep="/")
