"""Notes on allowed combinations of settings with an unexpected effect: one line each."""

from collections.abc import Iterator, Mapping
from typing import Any

from nrgpt_jax.configs import default_config
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.models.names import energy_names, is_nrgpt

OF_ENERGIES = (  # fields that baselines ignore; `mask` is for the models compared with them
    *("energies", "combination", "head_dim", "beta", "learn_beta", "learn_alpha", "norm"),
    *(
        "inference_rate",
        "rule",
        "inference_rate_init",
        "inference_rate_decay",
        "full_steps",
        "line_search",
        "per_step_scale",
    ),
)
UNSIZED = ("full", "identity")  # inference rates without an initial size


def notes(config: Mapping[str, Any], windows: int) -> list[str]:
    """Return notes on a configuration to print before training.

    Args:
      config: a checked configuration.
      windows: the number of training windows.
    """
    return [
        *_of_steps(config),
        *_of_data(config["data"], windows),
        *_of_model(dict(config["model"])),
    ]


def _of_steps(config: Mapping[str, Any]) -> Iterator[str]:
    optimizer, steps = config["optimizer"], config["train_steps"]
    warmup, growth = optimizer["warmup_steps"], config["depth"]["curriculum_steps"]
    if warmup >= steps:
        yield (
            f"optimizer.warmup_steps={warmup} is not below train_steps={steps}: the learning rate "
            "never reaches its peak and never decays"
        )
    final, peak = optimizer["final_learning_rate"], optimizer["learning_rate"]
    if final > peak and optimizer["schedule"] != "constant":
        yield f"optimizer.final_learning_rate={final} is above learning_rate={peak}: it rises"
    if growth > steps:
        yield f"depth.curriculum_steps={growth} is above train_steps={steps}: depth is never whole"
    every, permanent = config["checkpoint_every"], config["checkpoint_keep_every"]
    if every > steps:
        yield (
            f"checkpoint_every={every} is above train_steps={steps}: a run that is killed begins "
            "again at step 0"
        )
    if permanent % every:
        yield f"checkpoint_keep_every={permanent} is no multiple of checkpoint_every={every}"


def _of_data(data: Mapping[str, Any], windows: int) -> Iterator[str]:
    if data["batch_size"] > windows:
        yield (
            f"data.batch_size={data['batch_size']} is above the {windows} windows of the training "
            "split: a batch holds windows more than once"
        )


def _of_model(model: Mapping[str, Any]) -> Iterator[str]:
    usual = default_config().model
    if not is_nrgpt(model["name"]):
        for field in OF_ENERGIES:
            if model[field] != usual[field]:
                yield f"model.{field}={model[field]!r} has no effect on {model['name']}"
        return
    field = "inference_rate_decay"
    if model["full_steps"] and model[field] == 1.0:
        yield f"model.full_steps={model['full_steps']} has no effect with model.{field}=1"
    field, rate = "inference_rate_init", model["inference_rate"]
    if model[field] != usual[field] and rate in UNSIZED:
        yield f"model.{field}={model[field]} has no effect on model.inference_rate={rate}"
    names = energy_names(model)
    specs = [spec for name in names for spec in ENERGIES[name].specs.values()]
    if model["head_dim"] and not any("Y" in spec.axes for spec in specs):
        yield f"model.head_dim={model['head_dim']} has no effect on {', '.join(names)}"
