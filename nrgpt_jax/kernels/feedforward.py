"""The feed-forward energies for all tokens at once, with the rules of `gelu` and `linear`.

Products are in the type of g; energies are added up in float32 at least.
"""

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params, at_least_float32
from nrgpt_jax.core.contexts import BatchContext
from nrgpt_jax.kernels.gelu import gelu
from nrgpt_jax.kernels.linear import contract, expand


def ff1(params: Params, g: BatchStates, around: BatchContext) -> BatchEnergies:
    """`energies.ff1`."""
    del around
    return -_scaled_sum(params, gelu(_affine(g, params["W1"], params["b1"])) ** 2)


def ff2(params: Params, g: BatchStates, around: BatchContext) -> BatchEnergies:
    """`energies.ff2`."""
    del around
    hidden = gelu(_affine(g, params["W1"], params["b1"]))
    return -_scaled_sum(params, gelu(_affine(hidden, params["W2"], params["b2"])) ** 2)


def ff2w(params: Params, g: BatchStates, around: BatchContext) -> BatchEnergies:
    """`energies.ff2w`."""
    del around
    hidden = gelu(_affine(g, params["W1"], params["b1"]))
    return -_scaled_sum(params, g * (contract(hidden, params["W2"]) + params["b2"][None, None]))


def _affine(h: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return expand(h, weight) + bias[None, None]


def _scaled_sum(params: Params, parts: jax.Array) -> BatchEnergies:
    sums = jnp.sum(at_least_float32(parts), axis=-1)
    return at_least_float32(params["scale"]) * sums
