"""How a pure function says which parameters it needs.

Energies, norms and rates are functions of a parameter dictionary. Beside each stands a table
`name -> ParameterSpec` from which Flax modules (and `init_parameters`, for use without Flax)
create that dictionary. Initialisation follows the paper: N(0, 0.02) for matrices, 0 for biases.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import Key, Params

INIT_STD = 0.02


class Sizes(NamedTuple):
    """The widths that parameter shapes are made of."""

    D: int  # embedding width
    H: int = 1  # heads
    Y: int = 1  # head rank, read by low-rank attention only
    M: int = 1  # feed-forward hidden width


class ParameterSpec(NamedTuple):
    """Shape and initializer `(key, shape, dtype) -> array` of one parameter."""

    shape: tuple[int, ...]
    init: Callable[..., jax.Array]


Specs = Mapping[str, ParameterSpec]


def matrix(*shape: int) -> ParameterSpec:
    """A matrix (or a stack of them), drawn from N(0, 0.02)."""
    return ParameterSpec(shape, jax.nn.initializers.normal(INIT_STD))


def vector(*shape: int) -> ParameterSpec:
    """A bias, initially zero."""
    return ParameterSpec(shape, jax.nn.initializers.zeros)


def constant(value: float, *shape: int) -> ParameterSpec:
    """A gain or a scalar (no shape), initially `value`."""
    return ParameterSpec(shape, jax.nn.initializers.constant(value))


def init_parameters(key: Key, specs: Specs, dtype=jnp.float32) -> Params:
    """Draws every parameter of a table."""
    keys = jax.random.split(key, max(len(specs), 1))
    return {n: s.init(k, s.shape, dtype) for k, (n, s) in zip(keys, specs.items(), strict=False)}
