"""Checks of a whole configuration: every mistake is one line, raised before anything runs."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from nrgpt_jax.datasets import DATASETS
from nrgpt_jax.datasets.corpora import CORPORA
from nrgpt_jax.datasets.listops import OPERATIONS
from nrgpt_jax.errors import require, require_choice, require_not_negative, require_positive
from nrgpt_jax.models import create_model, sharding
from nrgpt_jax.models.model_checks import check_model
from nrgpt_jax.training.optimizers import DECAYS, OPTIMIZERS, SCHEDULES


def _check_data(data: Mapping[str, Any]) -> None:
    require_choice("data.name", data["name"], tuple(DATASETS))
    of_documents = data["name"] in CORPORA and data["name"] != "text"
    kinds = ("byte", "gpt2") if of_documents else ("char", "byte", "gpt2")
    require_choice("data.tokenizer", data["tokenizer"], kinds)
    fraction = data["validation_fraction"]
    require(0 < fraction < 1, "data.validation_fraction", fraction, "0 < fraction < 1")
    require_positive(data, "data.", "batch_size")
    if data["name"] == "listops":
        _check_listops(data["listops"])


def _check_listops(listops: Mapping[str, Any]) -> None:
    prefix = "data.listops."
    require(len(listops["operations"]) > 0, prefix + "operations", (), "name at least one")
    for operation in listops["operations"]:
        require_choice(prefix + "operations", operation, tuple(OPERATIONS))
    require_positive(listops, prefix, "depth", "min_arguments", "num_train", "num_test")
    require(listops["modulus"] > 1, prefix + "modulus", listops["modulus"], "at least 2")
    most, least = listops["max_arguments"], listops["min_arguments"]
    require(most >= least, prefix + "max_arguments", most, f"at least min_arguments={least}")
    for field in ("function_probability", "exclusion_rate"):
        require(0 <= listops[field] <= 1, prefix + field, listops[field], "between 0 and 1")
    tuples = int(listops["modulus"] ** most * listops["exclusion_rate"])
    rate = listops["exclusion_rate"]
    require(tuples > 0, prefix + "exclusion_rate", rate, "it must hold out one tuple at least")


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    prefix = "optimizer."
    require_choice(prefix + "name", optimizer["name"], OPTIMIZERS)
    require_choice(prefix + "schedule", optimizer["schedule"], SCHEDULES)
    require_choice(prefix + "decay", optimizer["decay"], DECAYS)
    require_positive(optimizer, prefix, "learning_rate", "accumulation_steps")
    require_not_negative(optimizer, prefix, "final_learning_rate")
    if optimizer["schedule"] == "exponential":
        require_positive(optimizer, prefix, "final_learning_rate")
    require_not_negative(optimizer, prefix, "warmup_steps", "weight_decay", "clip_norm")
    for field in ("beta1", "beta2"):
        require(0 <= optimizer[field] < 1, prefix + field, optimizer[field], "0 <= beta < 1")


def check_config(config: Mapping[str, Any], num_devices: int) -> None:
    """Checks a whole configuration. Raises UserError naming field, value and what is allowed."""
    steps = "train_steps", "log_every", "eval_every", "eval_windows", "checkpoint_every"
    require_positive(config, "", *steps)
    require_not_negative(config, "", "eval_prompts", "seed")
    wandb_missing = config["wandb"] and not importlib.util.find_spec("wandb")
    require(not wandb_missing, "wandb", True, "pip install wandb first")
    model = dict(config["model"])
    require_not_negative(model, "model.", "vocab_size")
    check_model({**model, "vocab_size": model["vocab_size"] or 1})
    _check_optimizer(config["optimizer"])
    _check_data(config["data"])
    data, fsdp, tensor = sharding.mesh_shape(config["mesh"], num_devices)
    _check_batch(config, data * fsdp, tensor)


def _check_batch(config: Mapping[str, Any], rows: int, tensor: int) -> None:
    """A batch must be split over so many groups of devices, and into parts; the cure is named."""
    size, parts = config["data"]["batch_size"], config["optimizer"]["accumulation_steps"]
    over = f"{rows} devices" if tensor == 1 else f"mesh.data x mesh.fsdp={rows}"
    cure = f"it must be a multiple of {over} x optimizer.accumulation_steps={parts}"
    if size % rows == 0:
        fitting = max(p for p in range(1, parts + 1) if size // rows % p == 0)
        cure += f"; optimizer.accumulation_steps={fitting} does"
    else:
        split = next(n for n in range(1, rows + 1) if rows % n == 0 and size % (rows // n) == 0)
        cure += f"; mesh.tensor={tensor * split} with optimizer.accumulation_steps=1 does"
    require(size % (rows * parts) == 0, "data.batch_size", size, cure)


def check_mesh(config: Mapping[str, Any], num_devices: int) -> None:
    """Checks that parameters can be split over the mesh, with `vocab_size` set.

    Raises:
      UserError: as `check_config`.
    """
    lengths = sharding.mesh_shape(config["mesh"], num_devices)
    sharding.check_sizes(create_model(config).sizes, dict(zip(sharding.AXES, lengths, strict=True)))
