"""Checks of `config.model`: every mistake is one line, raised before anything is compiled."""

from collections.abc import Mapping
from typing import Any

from nrgpt_jax.core.dynamics import REMAT
from nrgpt_jax.core.energies import ATTENTION
from nrgpt_jax.core.kernels import KERNELS
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rates import RATES
from nrgpt_jax.errors import require, require_choice, require_not_negative, require_positive
from nrgpt_jax.models.names import is_nrgpt, model_names

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "attention": ATTENTION,
    "mask": ("strict", "inclusive"),
    "norm": NORMS,
    "rate": RATES,
    "kernels": KERNELS,
    "remat": REMAT,
}


def validate_model(model: Mapping[str, Any]) -> None:
    """Checks `config.model`, with its `vocab_size` set. Raises UserError naming the field."""
    require_choice("model.name", model["name"], model_names())
    for field, allowed in _CHOICES.items():
        require_choice(f"model.{field}", model[field], allowed)
    require_positive(model, "model.", "vocab_size", "context_length", "embed_dim", "num_heads")
    require_positive(model, "model.", "num_steps", "mlp_ratio", "scan_unroll", "beta", "rate_init")
    require_not_negative(model, "model.", "head_dim")
    require(0 <= model["dropout"] < 1, "model.dropout", model["dropout"], "0 <= dropout < 1")
    width, heads = model["embed_dim"], model["num_heads"]
    needs_division = not is_nrgpt(model["name"]) or (
        model["attention"] == "low_rank" and not model["head_dim"]
    )
    require(
        not needs_division or width % heads == 0,
        "model.embed_dim",
        width,
        f"model.num_heads={heads} must divide it",
    )
    require(
        not is_nrgpt(model["name"]) or model["rate"] != "gamma" or model["norm"] != "none",
        "model.rate",
        "gamma",
        "it scales by the gain of the norm, and model.norm is 'none'; use scalar or psd",
    )
    require(
        is_nrgpt(model["name"]) or model["remat"] != "full",
        "model.remat",
        "full",
        "the transformer baselines have none and step",
    )
