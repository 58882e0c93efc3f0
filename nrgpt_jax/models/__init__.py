"""Models by name: the NRGPT family and its transformer baselines."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util
from flax.core import FrozenDict
from ml_collections import ConfigDict

from nrgpt_jax import plugins
from nrgpt_jax.configs import default_config
from nrgpt_jax.core import parameters
from nrgpt_jax.core.parameters import ParameterSpec
from nrgpt_jax.errors import UserError
from nrgpt_jax.models.gpt import GPT
from nrgpt_jax.models.language_model import LanguageModel
from nrgpt_jax.models.model_checks import check_model
from nrgpt_jax.models.names import energy_names, is_nrgpt, model_names
from nrgpt_jax.models.nrgpt import NRGPT

__all__ = [
    "LanguageModel",
    "abstract_params",
    "create_model",
    "model_names",
    "num_parameters",
    "parameter_shapes",
    "parameter_specs",
]


def create_model(
    config: Mapping[str, Any] | ConfigDict | None = None, /, **fields: Any
) -> LanguageModel:
    """Create the Flax module that a configuration describes.

        create_model(name="NRGPT_H_FF2W", vocab_size=65, embed_dim=64, num_steps=5)

    Args:
      config: a full configuration (`nrgpt_jax.configs.default_config()`), its `model` part, or some
        fields of that part; other fields have their defaults.
      fields: fields of `config.model`, which take precedence. `vocab_size` is set in either.

    Returns:
      A Linen module: `init(key, tokens)`, `apply(variables, tokens (B,N)) -> logits (B,N,V)`.

    Raises:
      UserError: a field is unknown or has an invalid value; the message names it.
    """
    base, usual = {} if config is None else config, default_config().model.to_dict()
    overrides = {**base.get("model", base), **fields}
    for name in overrides.keys() - usual.keys():
        raise UserError(f"unknown field model.{name}; there are {', '.join(usual)}")
    plugins.load(base.get("plugins", ()))
    model = {**usual, **overrides}
    check_model(model)
    model["options"] = FrozenDict(model["options"])
    name, nrgpt = model["name"], is_nrgpt(model["name"])
    module = NRGPT if nrgpt else GPT
    known = {n: v for n, v in model.items() if n in module.__dataclass_fields__ and n != "name"}
    known["num_distinct_layers"] = model["num_distinct_layers"] or (
        model["num_steps"] if name == "GPT" else 1
    )
    if nrgpt:
        return NRGPT(energy_names=energy_names(model), **known)
    return GPT(parallel=name.endswith("_parallel"), **known)


def parameter_specs(model: LanguageModel) -> Any:
    """Return the tree of parameters as `ParameterSpec`."""
    return parameters.stored_specs(model.tables())


def abstract_params(model: LanguageModel) -> Any:
    """Return the tree of parameters as `jax.ShapeDtypeStruct`; nothing is computed."""
    is_spec = lambda spec: isinstance(spec, ParameterSpec)
    shape = lambda spec: jax.ShapeDtypeStruct(spec.shape(model.sizes), "float32")
    return jax.tree.map(shape, parameter_specs(model), is_leaf=is_spec)


def num_parameters(model: LanguageModel) -> int:
    """Return the number of parameters, including embeddings and head."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))


def parameter_shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by path, `block/feedforward/W1`; nothing is computed."""
    flat = traverse_util.flatten_dict(abstract_params(model), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}
