"""Checks of a whole configuration, before anything runs; every error message is one line."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from nrgpt_jax import plugins
from nrgpt_jax.core.metrics import METRICS
from nrgpt_jax.credentials import check_no_credentials
from nrgpt_jax.datasets.data_checks import check_data
from nrgpt_jax.errors import require, require_choice
from nrgpt_jax.limits import LARGEST_DEPTH, check_limits
from nrgpt_jax.models import create_model, sharding
from nrgpt_jax.models.evaluators import check_evaluators
from nrgpt_jax.models.model_checks import check_memory, check_model
from nrgpt_jax.models.names import is_nrgpt
from nrgpt_jax.training import depths
from nrgpt_jax.training.optimizers import DECAYS, check_names

_GROUPS = ("model", "data", "optimizer", "depth")  # checked separately
_KEPT = 2  # copies of the parameters in memory, at least: they and one gradient moment


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    prefix = "optimizer."
    require_choice(prefix + "weight_decay_mask", optimizer["weight_decay_mask"], DECAYS)
    check_limits(optimizer, "optimizer")
    final, allowed = optimizer["final_learning_rate"], "above 0 with an exponential schedule"
    possible = final > 0 or optimizer["schedule"] != "exponential"
    require(possible, prefix + "final_learning_rate", final, allowed)
    check_names(optimizer)


def _check_depth(config: Mapping[str, Any]) -> None:
    fields, model, prefix = config["depth"], config["model"], "depth."
    require_choice(prefix + "distribution", fields["distribution"], depths.DISTRIBUTIONS)
    require_choice(prefix + "sample_per", fields["sample_per"], depths.EACH)
    check_limits(fields, "depth")
    for field in ("max_burn_in_passes", "consistency"):
        possible, allowed = (
            fields["refine_passes"] or not fields[field],
            f"0 without {prefix}refine_passes",
        )
        require(possible, prefix + field, fields[field], allowed)
    if fields["distribution"] == "fixed":
        for field in ("min_steps", "max_steps", "curriculum_steps"):
            allowed = "0 with depth.distribution=fixed; or set depth.distribution=uniform"
            require(not fields[field], prefix + field, fields[field], allowed)
    depth = depths.of_config(config)
    if depth is not None:
        _check_drawn(depth, model, prefix)


def _check_drawn(depth: depths.Depth, model: Mapping[str, Any], prefix: str) -> None:
    """Check depth settings other than the loss of the last state after all steps."""
    full = depth.min_steps == depth.max_steps == depth.backprop_steps and depth.loss_steps == 1
    # Whether steps differ in size.
    per_step = model["per_step_scale"] or model["inference_rate_decay"] < 1
    alike = model["num_distinct_layers"] in (0, 1) and model["name"] != "GPT"
    alike = alike and not (per_step and (depth.penalty or not full))
    allowed = "left as it is, like all of depth: the steps of this model are not all alike "
    allowed += (
        "(model.name, model.num_distinct_layers, model.per_step_scale, model.inference_rate_decay)"
    )
    require(alike, prefix + "distribution", depth.distribution, allowed)
    allowed = f"between {prefix}min_steps={depth.min_steps} and {LARGEST_DEPTH}"
    require(depth.max_steps >= depth.min_steps, prefix + "max_steps", depth.max_steps, allowed)
    fewest = min(depth.backprop_steps, depth.min_steps)
    allowed = f"at most {fewest}: the {depth.backprop_steps} steps that the gradient goes through, "
    allowed += f"and {prefix}min_steps={depth.min_steps}"
    require(depth.loss_steps <= fewest, prefix + "loss_steps", depth.loss_steps, allowed)
    strict = is_nrgpt(model["name"]) and model["mask"] == "strict"
    allowed = "left as it is: it needs a model with an energy, and model.mask=strict"
    require(strict or not depth.penalty, prefix + "penalty", depth.penalty, allowed)
    require(
        strict or not depth.refine_passes, prefix + "refine_passes", depth.refine_passes, allowed
    )
    require(
        strict or not depth.train_on_decoded,
        prefix + "train_on_decoded",
        depth.train_on_decoded,
        allowed,
    )
    allowed = f"0, or at least {prefix}max_steps={depth.max_steps}, with {prefix}refine_passes"
    full = depth.backprop_steps == depth.max_steps or not depth.refine_passes
    require(full, prefix + "backprop_steps", depth.backprop_steps, allowed)
    single, allowed = (
        depth.loss_steps == 1 or not depth.max_burn_in_passes,
        f"1 with {prefix}max_burn_in_passes",
    )
    require(single, prefix + "loss_steps", depth.loss_steps, allowed)
    if depth.train_on_decoded:
        fixed, allowed = depth.distribution == "fixed", f"fixed with {prefix}train_on_decoded"
        require(fixed, prefix + "distribution", depth.distribution, allowed)
        every, allowed = depth.backprop_steps == depth.max_steps, f"0 with {prefix}train_on_decoded"
        require(every, prefix + "backprop_steps", depth.backprop_steps, allowed)
        require(
            not depth.max_burn_in_passes,
            prefix + "max_burn_in_passes",
            depth.max_burn_in_passes,
            allowed,
        )


def check_config(config: Mapping[str, Any], num_devices: int) -> None:
    """Check a configuration. Raises UserError naming field, value and allowed values."""
    check_no_credentials(config)
    plugins.load(config["plugins"])
    check_limits({name: config[name] for name in config if name not in _GROUPS})
    factor, allowed = config["spike_factor"], "above 1; 0: never"
    require(factor == 0 or factor > 1, "spike_factor", factor, allowed)
    wandb_missing = config["wandb"] and not importlib.util.find_spec("wandb")
    require(not wandb_missing, "wandb", True, "pip install wandb first")
    model = dict(config["model"])
    check_model({**model, "vocab_size": model["vocab_size"] or 1})
    _check_optimizer(config["optimizer"])
    _check_depth(config)
    _check_step_metrics(config)
    check_evaluators(config["evaluators"])
    check_data(config["data"])
    data, fsdp, tensor = sharding.mesh_shape(config["mesh"], num_devices)
    _check_batch(config, data * fsdp, tensor)


def _check_step_metrics(config: Mapping[str, Any]) -> None:
    names = tuple(config["step_metrics"])
    if not names:
        return
    known = f"a tuple of names of {', '.join(METRICS)}"
    require(all(name in METRICS for name in names), "step_metrics", names, known)
    cure = "(): a transformer has no energy"
    require(is_nrgpt(config["model"]["name"]), "step_metrics", names, cure)
    cure = "(): with config.depth the number of recurrent steps, or what is read of them, varies"
    require(depths.of_config(config) is None, "step_metrics", names, cure)


def _check_batch(config: Mapping[str, Any], rows: int, tensor: int) -> None:
    """Check that a batch divides over `rows` groups of devices and into parts; suggest a fix."""
    size, parts = config["data"]["batch_size"], config["optimizer"]["accumulation_steps"]
    over = f"{rows} devices" if tensor == 1 else f"mesh.data x mesh.fsdp={rows}"
    cure = f"it must be a multiple of {over} x optimizer.accumulation_steps={parts}"
    if size % rows == 0:
        rest = size // rows
        fitting = max(p for p in range(1, min(parts, rest) + 1) if rest % p == 0)
        cure += f"; optimizer.accumulation_steps={fitting} does"
    else:
        split = next(n for n in range(1, rows + 1) if rows % n == 0 and size % (rows // n) == 0)
        cure += f"; mesh.tensor={tensor * split} with optimizer.accumulation_steps=1 does"
    require(size % (rows * parts) == 0, "data.batch_size", size, cure)


def check_mesh(config: Mapping[str, Any], num_devices: int) -> None:
    """Check that parameters can be sharded over the mesh and fit in memory; needs `vocab_size`.

    Raises:
      UserError: as `check_config`.
    """
    lengths = sharding.mesh_shape(config["mesh"], num_devices)
    model = create_model(config)
    sharding.check_sizes(model.sizes, dict(zip(sharding.AXES, lengths, strict=True)))
    _, fsdp, tensor = lengths
    check_memory(model, _KEPT, fsdp * tensor)
