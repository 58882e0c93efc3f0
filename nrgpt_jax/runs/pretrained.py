"""Trained models in one folder: model.safetensors, config.json, tokenizer.json, checksums.json.

A run directory opens in the same way. `nrgpt_jax.export` writes such folders.
"""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from nrgpt_jax import bundled, disk, paths
from nrgpt_jax.array_types import Variables
from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import LanguageModel, abstract_params, create_model, parameter_specs, sharding
from nrgpt_jax.models.model_checks import check_memory
from nrgpt_jax.runs import checksums
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import CONFIG_FILE, TOKENIZER_FILE, open_run, record_run
from nrgpt_jax.runs.record_checks import check_tokenizer

WEIGHTS_FILE = "model.safetensors"
SAVED = (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE)
CURE, HUB = "export the run again", "hf://"


class Pretrained(NamedTuple):
    """A trained model with its variables, tokenizer and configuration."""

    model: LanguageModel
    variables: Variables
    tokenizer: Tokenizer
    config: ConfigDict


def load_pretrained(folder: Path | str, checkpoint: str = "best") -> Pretrained:
    """Load a model from a run directory, or from a folder of `save_pretrained`.

    Args:
      folder: its path; or `hf://USER/NAME`, on the Hugging Face hub; or the name of a bundled
        model (`bundled.runs`).
      checkpoint: the checkpoint of a run directory, `best` or `latest`.

    Raises:
      UserError: a file is missing or damaged; the message names it.
    """
    if str(folder).startswith(HUB):
        from nrgpt_jax.runs import hub  # imports this module

        folder = hub.pull(str(folder))
    folder = bundled.run(folder)
    exported = checksums.exist(folder) or (folder / WEIGHTS_FILE).exists()
    if exported:
        _verify(folder)
    config, tokenizer = open_run(folder)
    check_tokenizer(folder, config, tokenizer)
    model = create_model(config)
    if exported:
        params = _exported_params(folder / WEIGHTS_FILE, model)
    else:
        params = read_params(folder, checkpoint, model)[1]
    return Pretrained(model, {"params": params}, tokenizer, config)


def read_params(workdir: Path | str, checkpoint: str, model: LanguageModel) -> tuple[int, Any]:
    """Read (step, parameters) of a `best` or `latest` checkpoint. Raises UserError if none."""
    check_memory(model)
    where = sharding.parameter_shardings(parameter_specs(model), sharding.make_mesh())
    with Checkpoints(paths.as_path(workdir)) as checkpoints:
        wanted = sharding.abstract(abstract_params(model), where)
        return checkpoints.restore_params(checkpoint, wanted)


def save_pretrained(folder: Path | str, pretrained: Pretrained) -> None:
    """Write a folder for `load_pretrained`, with bit-identical parameters.

    Raises:
      UserError: the folder holds checkpoints of a run.
      OSError: the folder cannot be written.
    """
    folder = paths.on_this_machine(folder)
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} is a run directory; name another folder")
    flat = traverse_util.flatten_dict(pretrained.variables["params"], sep="/")
    folder.mkdir(parents=True, exist_ok=True)
    with disk.replacing(folder / WEIGHTS_FILE) as partial:
        _write_weights(partial, {k: np.array(v, order="C") for k, v in flat.items()})
    record_run(folder, pretrained.config, pretrained.tokenizer)
    checksums.write(folder, SAVED)


def _verify(folder: Path) -> None:
    """Raise UserError if a file of an exported folder does not match its checksum."""
    damage = checksums.damage(folder)
    if damage:
        raise UserError(
            f"{folder}: {damage}; {CURE} (if you edited it, remove {checksums.FILE_NAME} there)"
        )
    if not checksums.exist(folder):
        text = "%s has no %s, as exports of older versions: it is not verified; %s"
        logging.warning(text, folder, checksums.FILE_NAME, CURE)


def _write_weights(path: Path, flat: Mapping[str, np.ndarray]) -> None:
    try:
        safetensors.save_file(dict(flat), path)
    except SafetensorError as error:  # also raised on a full disk
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file, by name. Raises UserError if it cannot be read."""
    try:
        return safetensors.load_file(path)
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own types, as for dtypes numpy lacks
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); {CURE}") from None


def _exported_params(path: Path, model: LanguageModel) -> Any:
    """Read the parameters of an exported folder, and check that they fit the model."""
    weights = read_weights(path)
    wanted = traverse_util.flatten_dict(abstract_params(model), sep="/")
    for name in sorted(set(wanted) | set(weights)):
        there, here = (_described(arrays.get(name)) for arrays in (weights, wanted))
        if there != here:
            raise UserError(f"{path} is of another model: parameter {name}: {there}, not {here}")
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: parameter {name} is not finite; {CURE}")
    return jax.device_put(traverse_util.unflatten_dict(weights, sep="/"))  # nothing is compiled


def _described(array: Any) -> str:
    if array is None:
        return "absent"
    kind = np.dtype(array.dtype).name
    return f"{tuple(array.shape)}" + (f" of {kind}" if kind != "float32" else "")
