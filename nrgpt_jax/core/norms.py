"""Norms g = norm(x), and the Lagrangians they are gradients of.

A norm without gain is the gradient of a convex Lagrangian L(x), summed over a token's features.
With a gain gamma and a bias b it is  norm(x) = gamma * grad L(x) + b,  whose Jacobian is
diag(gamma) P / sigma with P a projection: what Proposition 2.1 of the paper rests on. For a gain
of one, `lagrangian` counts the bias too, and its gradient is the norm itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from nrgpt_jax.array_types import Params, States, TokenEnergies
from nrgpt_jax.core.parameters import Sizes, Specs, constant, vector
from nrgpt_jax.core.registry import Registry

EPSILON = 1e-5


class Norm(NamedTuple):
    """A norm `(params, x) -> g`, its Lagrangian `(params, x) -> per token`, its parameters."""

    function: Callable[[Params, States], States]
    lagrangian: Callable[[Params, States], TokenEnergies]
    specs: Callable[[Sizes], Specs]


NORMS: Registry[Norm] = Registry("norm")


def layer_norm(params: Params, x: States) -> States:
    """gamma * (x - mean) / sqrt(variance + eps) + b, over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    sigma = jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
    return _gain(params, centred / sigma) + params["bias"][None]


def layer_norm_lagrangian(params: Params, x: States) -> TokenEnergies:
    """L(x) = D sqrt(variance(x) + eps) + b . x, one value a token."""
    variance = jnp.var(x, axis=-1)
    return x.shape[-1] * jnp.sqrt(variance + EPSILON) + x @ params["bias"]


def rms_norm(params: Params, x: States) -> States:
    """gamma * x / sqrt(mean(x^2) + eps), over the last axis."""
    return _gain(params, x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON))


def rms_norm_lagrangian(params: Params, x: States) -> TokenEnergies:
    """L(x) = D sqrt(mean(x^2) + eps), one value a token."""
    del params
    return x.shape[-1] * jnp.sqrt(jnp.mean(x**2, axis=-1) + EPSILON)


def identity(params: Params, x: States) -> States:
    """g = x."""
    del params
    return x


def identity_lagrangian(params: Params, x: States) -> TokenEnergies:
    """L(x) = ||x||^2 / 2, one value a token."""
    del params
    return 0.5 * jnp.sum(x**2, axis=-1)


def _gain(params: Params, normalized: States) -> States:
    return params["gain"][None] * normalized if "gain" in params else normalized


def _gain_and_bias(sizes: Sizes) -> Specs:
    return {"gain": constant(1.0, sizes.D), "bias": vector(sizes.D)}


NORMS.add(
    "bare_layer_norm", Norm(layer_norm, layer_norm_lagrangian, lambda s: {"bias": vector(s.D)})
)
NORMS.add("layer_norm", Norm(layer_norm, layer_norm_lagrangian, _gain_and_bias))
NORMS.add("rms_norm", Norm(rms_norm, rms_norm_lagrangian, lambda s: {"gain": constant(1.0, s.D)}))
NORMS.add("none", Norm(identity, identity_lagrangian, lambda s: {}))
