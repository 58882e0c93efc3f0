"""Grids of runs for sweeps: models by widths by learning rates, or all variants."""

from typing import NamedTuple

from nrgpt_jax.configs import with_seeds
from nrgpt_jax.errors import UserError


class Grid(NamedTuple):
    """One scale of a sweep."""

    widths: tuple[int, ...]
    rates: tuple[float, ...]  # learning rates
    seeds: int


def point(name, variant, models):
    """Parse a variant MODEL_WIDTH into model and width."""
    model, _, width = variant.rpartition("_")
    if model not in models or not width.isdecimal():
        raise UserError(f"{variant!r} is no variant of {name}: MODEL_WIDTH")
    return model, int(width)


def runs(name, scale, grids, models, config_of):
    """Return the runs `MODEL_WIDTH@LEARNING_RATE/SEED` of a scale.

    Args:
      name: name of the sweep, for messages.
      scale: one of `grids`.
      grids: grids by scale.
      models: names of the models.
      config_of: function (scale, model, width, learning rate) -> configuration.
    """
    check_scale(name, scale, grids)
    grid = grids[scale]
    cells = {
        f"{model}_{width}@{rate:g}": config_of(scale, model, width, rate)
        for width in grid.widths
        for model in models
        for rate in grid.rates
    }
    return with_seeds(cells, grid.seeds)


def all_variants(name, scale, get_config, variants):
    """Return every variant with three seeds, for a sweep with a single scale."""
    check_scale(name, scale, [""])
    return with_seeds({variant: get_config(variant) for variant in variants}, seeds=3)


def check_scale(name, scale, scales):
    if scale not in scales:
        known = ", ".join(filter(None, scales)) or "one, without a name"
        raise UserError(f"{name} has no scale {scale!r}; it has {known}")
