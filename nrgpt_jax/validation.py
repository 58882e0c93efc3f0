"""Checks of a configuration: every mistake is one line, raised before anything is compiled."""

from collections.abc import Mapping
from typing import Any

from nrgpt_jax.core.energies import ATTENTION
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rates import RATES
from nrgpt_jax.errors import UserError

_CHOICES = {
    "dtype": lambda: ("float32", "bfloat16"),
    "attention": lambda: tuple(ATTENTION),
    "mask": lambda: ("strict", "inclusive"),
    "norm": lambda: tuple(NORMS),
    "rate": lambda: tuple(RATES),
}


def _require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"{field}={value!r} is not possible: {allowed}")


def _choice(field: str, value: Any, allowed) -> None:
    _require(value in allowed, field, value, "choose one of " + ", ".join(allowed))


def _positive(config: Mapping[str, Any], prefix: str, *fields: str) -> None:
    for field in fields:
        _require(config[field] > 0, prefix + field, config[field], "it must be positive")


def _not_negative(config: Mapping[str, Any], prefix: str, *fields: str) -> None:
    for field in fields:
        _require(config[field] >= 0, prefix + field, config[field], "it must not be negative")


def validate_model(model: Mapping[str, Any]) -> None:
    """Checks `config.model`, with its `vocab_size` set. Raises UserError naming the field."""
    from nrgpt_jax.models import is_nrgpt, model_names  # they ask this module for a check

    _choice("model.name", model["name"], model_names())
    for field, allowed in _CHOICES.items():
        _choice(f"model.{field}", model[field], allowed())
    sizes = "vocab_size", "context_length", "embed_dim", "num_heads", "num_steps", "mlp_ratio"
    _positive(model, "model.", *sizes, "beta", "rate_init")
    _not_negative(model, "model.", "head_dim")
    _require(0 <= model["dropout"] < 1, "model.dropout", model["dropout"], "0 <= dropout < 1")
    width, heads = model["embed_dim"], model["num_heads"]
    needs_division = not is_nrgpt(model["name"]) or (
        model["attention"] == "low_rank" and not model["head_dim"]
    )
    _require(
        not needs_division or width % heads == 0,
        "model.embed_dim",
        width,
        f"model.num_heads={heads} must divide it",
    )
    _require(
        not is_nrgpt(model["name"]) or model["rate"] != "gamma" or model["norm"] != "none",
        "model.rate",
        "gamma",
        "it scales by the gain of the norm, and model.norm is 'none'; use scalar or psd",
    )


def _validate_data(data: Mapping[str, Any], accumulation_steps: int, num_devices: int) -> None:
    from nrgpt_jax.datasets import DATASETS

    _choice("data.name", data["name"], tuple(DATASETS))
    _choice("data.tokenizer", data["tokenizer"], ("char", "byte"))
    fraction = data["validation_fraction"]
    _require(0 < fraction < 1, "data.validation_fraction", fraction, "0 < fraction < 1")
    _positive(data, "data.", "batch_size")
    parts = accumulation_steps * num_devices
    _require(
        data["batch_size"] % parts == 0,
        "data.batch_size",
        data["batch_size"],
        f"it must be a multiple of {num_devices} devices x "
        f"optimizer.accumulation_steps={accumulation_steps}",
    )
    if data["name"] == "listops":
        _validate_listops(data["listops"])


def _validate_listops(listops: Mapping[str, Any]) -> None:
    from nrgpt_jax.datasets.listops import OPERATIONS

    prefix = "data.listops."
    _require(len(listops["operations"]) > 0, prefix + "operations", (), "name at least one")
    for operation in listops["operations"]:
        _choice(prefix + "operations", operation, tuple(OPERATIONS))
    _positive(listops, prefix, "depth", "min_arguments", "num_train", "num_test")
    _require(listops["modulus"] > 1, prefix + "modulus", listops["modulus"], "at least 2")
    most, least = listops["max_arguments"], listops["min_arguments"]
    _require(most >= least, prefix + "max_arguments", most, f"at least min_arguments={least}")
    for field in ("function_probability", "exclusion_rate"):
        _require(0 <= listops[field] <= 1, prefix + field, listops[field], "between 0 and 1")
    tuples = int(listops["modulus"] ** most * listops["exclusion_rate"])
    rate = listops["exclusion_rate"]
    _require(tuples > 0, prefix + "exclusion_rate", rate, "it must hold out one tuple at least")


def _validate_optimizer(optimizer: Mapping[str, Any]) -> None:
    prefix = "optimizer."
    _choice(prefix + "schedule", optimizer["schedule"], ("cosine", "exponential", "constant"))
    _positive(optimizer, prefix, "learning_rate", "final_learning_rate", "accumulation_steps")
    _not_negative(optimizer, prefix, "warmup_steps", "weight_decay", "clip_norm")
    for field in ("beta1", "beta2"):
        _require(0 <= optimizer[field] < 1, prefix + field, optimizer[field], "0 <= beta < 1")


def validate(config: Mapping[str, Any], num_devices: int) -> None:
    """Checks a whole configuration. Raises UserError naming field, value and what is allowed."""
    steps = "train_steps", "log_every", "eval_every", "eval_windows", "checkpoint_every"
    _positive(config, "", *steps)
    _not_negative(config, "", "eval_prompts", "seed")
    model = dict(config["model"])
    _not_negative(model, "model.", "vocab_size")
    validate_model({**model, "vocab_size": model["vocab_size"] or 1})
    _validate_optimizer(config["optimizer"])
    _validate_data(config["data"], config["optimizer"]["accumulation_steps"], num_devices)
