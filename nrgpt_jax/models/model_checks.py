"""Checks of `config.model`: every error is one line, raised before compilation."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from nrgpt_jax import host
from nrgpt_jax.core import parameters
from nrgpt_jax.core.block import COMBINATIONS, REMAT
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.parameters import ParameterSpec
from nrgpt_jax.core.rules import RATES, RULES
from nrgpt_jax.errors import UserError, require, require_choice
from nrgpt_jax.limits import check_limits
from nrgpt_jax.models.names import (
    NRGPT_NAME,
    energies_labelled,
    energy_names,
    is_nrgpt,
    model_names,
    registered_parts,
)
from nrgpt_jax.ops import IMPLEMENTATIONS
from nrgpt_jax.registry import check_options

if TYPE_CHECKING:
    from nrgpt_jax.models.language_model import LanguageModel

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "mask": ("strict", "inclusive"),
    "norm": NORMS,
    "inference_rate": RATES,
    "rule": RULES,
    "combination": COMBINATIONS,
    "implementation": IMPLEMENTATIONS,
    "remat": REMAT,
}
_FLOAT32 = 4  # bytes


def check_model(model: Mapping[str, Any]) -> None:
    """Check `config.model`, with its `vocab_size` set. Raises UserError naming the field."""
    require_choice("model.name", model["name"], [*model_names(), NRGPT_NAME])
    require_choice("model.attention", model["attention"], energies_labelled("attention"))
    for field, allowed in _CHOICES.items():
        require_choice(f"model.{field}", model[field], allowed)
    check_limits(model, "model")
    require(model["vocab_size"] > 0, "model.vocab_size", model["vocab_size"], "above 0")
    steps = model["num_steps"]
    require(
        model["num_distinct_layers"] <= steps,
        "model.num_distinct_layers",
        model["num_distinct_layers"],
        f"at most num_steps={steps}",
    )
    if is_nrgpt(model["name"]):
        _check_energies(model)
    else:
        _check_heads(model)
    _check_options(model)


def _check_options(model: Mapping[str, Any]) -> None:
    """Check that each option belongs to a part of the model, its type, and lengths of axes."""
    sound = hasattr(model["options"], "items")
    require(sound, "model.options", model["options"], "a mapping of names to values")
    known: dict[str, Any] = {}
    for registry, name in registered_parts(model):
        for option, usual in registry.options[name].items():
            place = f"model.options.{option}"
            alike = known.setdefault(option, usual) == usual or option in model["options"]
            require(alike, place, usual, f"another part has {known[option]!r} there: set it")
            free = not parameters.is_letter(option)
            require(free, place, usual, "another axis has that letter; rename it")
    check_options("model.options", model["options"], known)
    for registry, name in registered_parts(model):
        specs: Any = registry[name].specs
        for axis in sorted(parameters.own_axes(specs(1.0) if callable(specs) else specs)):
            length = model["options"].get(axis, known.get(axis, 0))
            sound = isinstance(length, int) and length > 0
            cure = f"it is an axis of {registry.kind} {name}: an option of that name is its length"
            require(sound, f"model.options.{axis}", length, cure)


def _check_energies(model: Mapping[str, Any]) -> None:
    names = energy_names(model)
    allowed = f"a tuple of names, each once, of {', '.join(ENERGIES)}"
    sound = len(names) > 0 and len(set(names)) == len(names) and all(n in ENERGIES for n in names)
    require(sound, "model.energies", tuple(model["energies"]), allowed)
    of_rank = any("Y" in spec.axes for n in names for spec in ENERGIES[n].specs.values())
    if of_rank and not model["head_dim"]:
        _check_heads(model)
    cure = "it scales by the gain of the norm, and model.norm is 'none'; use scalar or psd"
    require(
        model["inference_rate"] != "gamma" or model["norm"] != "none",
        "model.inference_rate",
        "gamma",
        cure,
    )
    cure = "the rule sphere moves along the unit sphere of a norm, and this is 'none'"
    require(model["rule"] != "sphere" or model["norm"] != "none", "model.norm", "none", cure)
    cure = "False: with the rule sphere a step of another size would leave the sphere"
    scaled = model["rule"] == "sphere" and model["per_step_scale"]
    require(not scaled, "model.per_step_scale", True, cure)
    cure = "the leak is the Lagrangian of a norm without gain; use bare_layer_norm or none"
    has_gain = "gain" in NORMS[model["norm"]].specs
    require(not ("leak" in names and has_gain), "model.norm", model["norm"], cure)


def _check_heads(model: Mapping[str, Any]) -> None:
    width, heads = model["embed_dim"], model["num_heads"]
    cure = f"model.num_heads={heads} must divide it"
    require(width % heads == 0, "model.embed_dim", width, cure)


def check_memory(model: "LanguageModel", copies: int = 1, parts: int = 1) -> None:
    """Raise UserError if the parameters alone do not fit on a device.

    Args:
      model: from `create_model`; nothing is allocated.
      copies: least number of arrays of the parameters' size that are kept.
      parts: number of devices over which the parameters are sharded.
    """
    tree = parameters.stored_specs(model.tables())
    specs = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))
    sizes = model.sizes
    largest = max((spec.shape(sizes) for spec in specs), key=math.prod)
    count = sum(math.prod(spec.shape(sizes)) for spec in specs)
    needed, free = _FLOAT32 * count * copies // parts, host.free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"the model has {count:,} parameters (one array is {' x '.join(map(str, largest))}): "
            f"they need {needed / 1e9:,.1f} GB on a device and {free / 1e9:.1f} GB are free; make "
            "model.embed_dim, model.num_heads, model.context_length or model.vocab_size smaller"
        )
