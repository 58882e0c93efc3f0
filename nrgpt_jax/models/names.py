"""The values of `config.model.name`, and the energies that each stands for."""

from collections.abc import Mapping
from typing import Any

from nrgpt_jax.core.block import COMBINATIONS
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rules import RATES, RULES
from nrgpt_jax.registry import Registry

NRGPT_NAME, NRGPT_PREFIX = "NRGPT", "NRGPT_H_"
BASELINES = ("GPT", "GPT_Rec", "GPT_Rec_parallel")


def energies_labelled(label: str) -> list[str]:
    """Return the registered energies with a label: `attention`, `feedforward`."""
    return [name for name, entry in ENERGIES.items() if entry.label == label]


def model_names() -> list[str]:
    """Return `NRGPT_H_<name>` for every registered feed-forward energy, and the baselines."""
    return [NRGPT_PREFIX + name for name in energies_labelled("feedforward")] + list(BASELINES)


def is_nrgpt(name: str) -> bool:
    """Whether the name is that of an energy model rather than a baseline."""
    return name == NRGPT_NAME or name.startswith(NRGPT_PREFIX)


def registered_parts(model: Mapping[str, Any]) -> list[tuple[Registry, str]]:
    """Return the registered parts that `config.model` names; none for a transformer."""
    if not is_nrgpt(model["name"]):
        return []
    energies: list[tuple[Registry, str]] = [(ENERGIES, name) for name in energy_names(model)]
    fields: dict[str, Registry] = {
        "norm": NORMS,
        "inference_rate": RATES,
        "rule": RULES,
        "combination": COMBINATIONS,
    }
    return energies + [(registry, model[field]) for field, registry in fields.items()]


def energy_names(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the energies of `config.model`.

    `NRGPT_H_FF2W` stands for `model.attention`, FF2W and `model.energies`; `NRGPT` for
    `model.energies` alone.
    """
    extra = tuple(model["energies"])
    if model["name"] == NRGPT_NAME:
        return extra
    return (model["attention"], model["name"].removeprefix(NRGPT_PREFIX), *extra)
