"""Norms g = norm(x) over the last axis of x, and the Lagrangians of which they are gradients.

A norm without gain is the gradient of a convex Lagrangian L(x). With a gain gamma and a bias b it
is norm(x) = gamma * grad L(x) + b. Its Jacobian is diag(gamma) P / sigma with P a projection, the
basis of Proposition 2.1 of the paper. For a gain of one, `lagrangian` includes the bias, and its
gradient is the norm itself.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax import ops
from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params
from nrgpt_jax.core.parameters import Specs, constant, vector
from nrgpt_jax.ops.dense import EPSILON
from nrgpt_jax.registry import Registry

States = Float[Array, "*B D"]
Energies = Float[Array, "*B"]


class Norm(NamedTuple):
    """A norm `(params, x) -> g`, its Lagrangian, sigma, and the table of its parameters.

    `convex` declares that g = gain * grad L(x) + bias with L convex, the condition of Proposition
    2.1. `batched`: acts on the last axis; a norm of one token is vectorized by `jax.vmap`.
    """

    function: Callable[[Params, States], States]
    lagrangian: Callable[[Params, States], Energies]
    sigma: Callable[[States], Energies]  # the divisor of x
    specs: Specs
    convex: bool = False
    batched: bool = False


NORMS: Registry[Norm] = Registry("norm")


class BoundNorm(NamedTuple):
    """A norm with bound parameters, for all tokens at once."""

    function: Callable[[BatchStates], BatchStates]
    lagrangian: Callable[[BatchStates], BatchEnergies]
    sigma: Callable[[BatchStates], BatchEnergies]
    unit: Callable[[BatchStates], BatchStates]  # the norm without gain and bias


def bind_norm(name: str, params: Params, implementation: str = "fused") -> BoundNorm:
    """Bind a registered norm to its parameters.

    Args:
      name: name in `NORMS`.
      params: all parameters in its table.
      implementation: implementation of its operations, one of `ops.IMPLEMENTATIONS`.
    """
    norm = NORMS[name]
    bare = {name: jnp.zeros_like(value) for name, value in params.items() if name == "bias"}

    def of_all(function: Callable, *leading: Params) -> Callable:
        def bound(x: BatchStates) -> jax.Array:
            with ops.implementation(implementation if norm.batched else "autodiff"):
                of_x = partial(function, *leading)
                return of_x(x) if norm.batched else jax.vmap(jax.vmap(of_x))(x)

        return bound

    return BoundNorm(
        of_all(norm.function, params),
        of_all(norm.lagrangian, params),
        of_all(norm.sigma),
        of_all(norm.function, bare),
    )


def layer_norm(params: Params, x: States) -> States:
    """gamma * (x - mean) / sqrt(variance + eps) + b."""
    y = _gain(params, ops.standardize(x))
    return y + ops.along_last_axis(params["bias"], x)


def deviation(x: States) -> Energies:
    """sqrt(variance + eps), with the variance of centred values to avoid cancellation."""
    return jnp.sqrt(jnp.var(x, axis=-1) + EPSILON)


def layer_norm_lagrangian(params: Params, x: States) -> Energies:
    """L(x) = D sqrt(variance(x) + eps) + b . x."""
    return x.shape[-1] * deviation(x) + ops.dot(x, ops.along_last_axis(params["bias"], x))


def rms_norm(params: Params, x: States) -> States:
    """gamma * x / sqrt(mean(x^2) + eps)."""
    return _gain(params, x / root_mean_square(x)[..., None])


def root_mean_square(x: States) -> Energies:
    """sqrt(mean(x^2) + eps)."""
    return jnp.sqrt(jnp.mean(x**2, axis=-1) + EPSILON)


def rms_norm_lagrangian(params: Params, x: States) -> Energies:
    """L(x) = D sqrt(mean(x^2) + eps)."""
    del params
    return x.shape[-1] * root_mean_square(x)


def identity(params: Params, x: States) -> States:
    """g = x."""
    del params
    return x


def identity_lagrangian(params: Params, x: States) -> Energies:
    """L(x) = ||x||^2 / 2."""
    del params
    return 0.5 * ops.dot(x, x)


def _gain(params: Params, normalized: States) -> States:
    gain = params.get("gain")
    return normalized if gain is None else ops.along_last_axis(gain, normalized) * normalized


_GAIN, _BIAS = {"gain": constant(1.0, "D")}, {"bias": vector("D")}
_LAYER = (layer_norm, layer_norm_lagrangian, deviation)

NORMS.add("bare_layer_norm", Norm(*_LAYER, _BIAS, convex=True, batched=True))
NORMS.add("layer_norm", Norm(*_LAYER, {**_GAIN, **_BIAS}, convex=True, batched=True))
_RMS = (rms_norm, rms_norm_lagrangian, root_mean_square)
NORMS.add("rms_norm", Norm(*_RMS, _GAIN, convex=True, batched=True))
_NONE = (identity, identity_lagrangian, lambda x: jnp.ones(x.shape[:-1], x.dtype))
NORMS.add("none", Norm(*_NONE, {}, convex=True, batched=True))
