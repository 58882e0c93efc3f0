"""Runs of version 0.1, whose parameters had other names: read here, to be written again."""

import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nrgpt_jax.datasets.tokenizers import RESTORE, load_tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import create_model, parameter_shapes
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import CONFIG_FILE, TOKENIZER_FILE, load_config, record_run
from nrgpt_jax.runs.pretrained import WEIGHTS_FILE, read_weights
from nrgpt_jax.runs.record_checks import check_tokenizer

_RENAMED = {
    "attention_params": "block/attention",
    "feedforward_params": "block/feedforward",
    "norm_params": "block/norm",
    "rate_params": "block/rate",
    "scales/scale_ff": "block/feedforward/scale",
    "scales/log_step_scale": "steps/log_scale",
    "final_norm/scale": "final_norm/gain",
    "blocks": "block",
}
_OF_BLOCK = {
    r"attention/(query|key|value|projection)/kernel": r"attention/\1",
    r"attention/projection/bias": "attention/bias",
    r"mlp/(up|down)/kernel": r"mlp/\1",
    r"mlp/(up|down)/bias": r"mlp/\1_bias",
    r"(norm\d)/scale": r"\1/gain",
}


def convert_run(old: Path, new: Path) -> None:
    """Writes a run directory with the parameters of a run or an exported folder of version 0.1.

    They are the best ones (else the latest), and all there is: training does not resume from it.

    Raises:
      UserError: `old` is no such run, or `new` holds a run.
    """
    if (new / CONFIG_FILE).exists():
        raise UserError(f"{new} holds a run already; name another --workdir")
    config = load_config(old, from_version_1=True)
    step, loss = 0, float("nan")
    if (old / WEIGHTS_FILE).exists():
        weights: Mapping[str, np.ndarray] = read_weights(old / WEIGHTS_FILE)
    else:
        with Checkpoints(old) as checkpoints:
            step, params, loss = checkpoints.restore_as_saved()
        weights = traverse_util.flatten_dict(params, sep="/")
    flat = {name: np.asarray(value) for name, value in renamed(weights).items()}
    if config.model.name == "GPT" and config.model.num_steps == 1:  # a stack of one block
        flat = {k: v[0] if k.startswith("block/") and v.ndim else v for k, v in flat.items()}
    expected = parameter_shapes(create_model(config))
    if {path: value.shape for path, value in flat.items()} != expected:
        raise UserError(f"{old} does not hold the parameters that its {CONFIG_FILE} describes")
    for name, value in flat.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise UserError(f"{old}: parameter {name} is not of finite 32-bit numbers; {RESTORE}")
    tokenizer = load_tokenizer(old / TOKENIZER_FILE)
    check_tokenizer(old, config, tokenizer)
    nested = traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in flat.items()}, sep="/")
    with Checkpoints(new, writable=True) as checkpoints:
        checkpoints.save_best(step, nested, loss)
    record_run(new, config, tokenizer)


def renamed(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters by path, under their names of now."""
    return {_name(path): value for path, value in params.items()}


def _name(path: str) -> str:
    for old, new in _RENAMED.items():
        if path == old or path.startswith(old + "/"):
            path = new + path[len(old) :]
            break
    for old, new in _OF_BLOCK.items():
        path = re.sub(rf"^block/{old}$", f"block/{new}", path)
    return path
