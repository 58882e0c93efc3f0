"""Models by name: the NRGPT family and its transformer baselines."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from nrgpt_jax.models.depth import with_num_steps
from nrgpt_jax.models.gpt import GPT
from nrgpt_jax.models.names import NRGPT_PREFIX, is_nrgpt, model_names
from nrgpt_jax.models.nrgpt import NRGPT
from nrgpt_jax.models.validation import validate_model

__all__ = [
    "abstract_params",
    "create_model",
    "is_nrgpt",
    "model_names",
    "parameter_shapes",
    "with_num_steps",
]


def create_model(config: Mapping[str, Any]) -> nn.Module:
    """The Flax module that a configuration describes.

    Args:
      config: a whole configuration (`nrgpt_jax.configs.default_config()`) or its `model` part,
        with `vocab_size` set.

    Returns:
      A Linen module: `init(key, tokens)`, `apply(variables, tokens (B,N)) -> logits (B,N,V)`.

    Raises:
      UserError: a field has a value that cannot be built; the message names it.
    """
    fields = dict(config.get("model", config))
    validate_model(fields)
    name = fields.pop("name")
    common = {key: fields[key] for key in _COMMON_FIELDS}
    if is_nrgpt(name):
        own = {key: fields[key] for key in _NRGPT_FIELDS}
        return NRGPT(feedforward=name.removeprefix(NRGPT_PREFIX), **common, **own)
    return GPT(shared=name != "GPT", parallel=name.endswith("_parallel"), **common)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path, `feedforward_params/W1`; nothing is computed."""
    flat = traverse_util.flatten_dict(abstract_params(model), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def abstract_params(model: nn.Module) -> Any:
    """The tree of parameters as `jax.ShapeDtypeStruct`; nothing is computed."""
    tokens = jax.ShapeDtypeStruct((1, model.context_length), "int32")
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


_COMMON_FIELDS = (
    "vocab_size",
    "context_length",
    "embed_dim",
    "num_heads",
    "num_steps",
    "mlp_ratio",
    "dropout",
    "tied_head",
    "dtype",
    "scan_unroll",
    "remat",
)
_NRGPT_FIELDS = (
    "attention",
    "head_dim",
    "mask",
    "beta",
    "learn_beta",
    "learn_alpha",
    "norm",
    "rate",
    "rate_init",
    "per_step_scale",
    "kernels",
)
