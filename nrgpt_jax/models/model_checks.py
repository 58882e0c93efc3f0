"""Checks of `config.model`: every mistake is one line, raised before anything is compiled."""

from collections.abc import Mapping
from typing import Any

from nrgpt_jax.core.dynamics import REMAT
from nrgpt_jax.core.energies import COMBINATIONS, ENERGIES
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rates import RATES
from nrgpt_jax.core.rules import RULES
from nrgpt_jax.errors import require, require_choice, require_not_negative, require_positive
from nrgpt_jax.kernels import CHOICES
from nrgpt_jax.models.names import (
    NRGPT_NAME,
    energies_labelled,
    energy_names,
    is_nrgpt,
    model_names,
)

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "mask": ("strict", "inclusive"),
    "norm": NORMS,
    "rate": RATES,
    "rule": RULES,
    "combination": COMBINATIONS,
    "kernels": CHOICES,
    "remat": REMAT,
}


def check_model(model: Mapping[str, Any]) -> None:
    """Checks `config.model`, with its `vocab_size` set. Raises UserError naming the field."""
    require_choice("model.name", model["name"], [*model_names(), NRGPT_NAME])
    require_choice("model.attention", model["attention"], energies_labelled("attention"))
    for field, allowed in _CHOICES.items():
        require_choice(f"model.{field}", model[field], allowed)
    require_positive(model, "model.", "vocab_size", "context_length", "embed_dim", "num_heads")
    require_positive(model, "model.", "num_steps", "mlp_ratio", "scan_unroll", "beta", "rate_init")
    require_not_negative(model, "model.", "head_dim", "blocks")
    require(0 <= model["dropout"] < 1, "model.dropout", model["dropout"], "0 <= dropout < 1")
    steps = model["num_steps"]
    require(model["blocks"] <= steps, "model.blocks", model["blocks"], f"at most num_steps={steps}")
    if is_nrgpt(model["name"]):
        _check_energies(model)
    else:
        _check_heads(model)


def _check_energies(model: Mapping[str, Any]) -> None:
    names = energy_names(model)
    allowed = f"a tuple of names, each once, of {', '.join(ENERGIES)}"
    sound = len(names) > 0 and len(set(names)) == len(names) and all(n in ENERGIES for n in names)
    require(sound, "model.energies", tuple(model["energies"]), allowed)
    of_rank = any("Y" in spec.axes for n in names for spec in ENERGIES[n].specs.values())
    if of_rank and not model["head_dim"]:
        _check_heads(model)
    cure = "it scales by the gain of the norm, and model.norm is 'none'; use scalar or psd"
    require(model["rate"] != "gamma" or model["norm"] != "none", "model.rate", "gamma", cure)
    cure = "the leak is the Lagrangian of a norm without gain; use bare_layer_norm or none"
    has_gain = "gain" in NORMS[model["norm"]].specs
    require(not ("leak" in names and has_gain), "model.norm", model["norm"], cure)


def _check_heads(model: Mapping[str, Any]) -> None:
    width, heads = model["embed_dim"], model["num_heads"]
    cure = f"model.num_heads={heads} must divide it"
    require(width % heads == 0, "model.embed_dim", width, cure)
