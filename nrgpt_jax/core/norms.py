"""Norms g = norm(x) of one token, and the Lagrangians they are gradients of.

A norm without gain is the gradient of a convex Lagrangian L(x). With a gain gamma and a bias b it
is  norm(x) = gamma * grad L(x) + b,  whose Jacobian is diag(gamma) P / sigma with P a projection:
what Proposition 2.1 of the paper rests on. For a gain of one, `lagrangian` counts the bias too,
and its gradient is the norm itself.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params
from nrgpt_jax.core.parameters import Specs, constant, vector
from nrgpt_jax.core.registry import Registry

EPSILON = 1e-5

Token = Float[Array, "D"]
Scalar = Float[Array, ""]


class Norm(NamedTuple):
    """A norm `(params, x) -> g`, its Lagrangian, sigma, and the table of its parameters.

    `convex` declares that g = gain * grad L(x) + bias with L convex, what Proposition 2.1 rests on.
    """

    function: Callable[[Params, Token], Token]
    lagrangian: Callable[[Params, Token], Scalar]
    sigma: Callable[[Token], Scalar]  # what x is divided by
    specs: Specs
    convex: bool = False


NORMS: Registry[Norm] = Registry("norm")


class BoundNorm(NamedTuple):
    """A norm with its parameters, for all tokens at once."""

    function: Callable[[BatchStates], BatchStates]
    lagrangian: Callable[[BatchStates], BatchEnergies]
    sigma: Callable[[BatchStates], BatchEnergies]
    unit: Callable[[BatchStates], BatchStates]  # without gain and bias: onto the unit sphere


def bind_norm(name: str, params: Params, kernel: Callable | None = None) -> BoundNorm:
    """A registered norm with its parameters.

    Args:
      name: in `NORMS`.
      params: all that its table names.
      kernel: a faster `(params, x (B,N,D)) -> g` of the same values.
    """
    norm, over_tokens = NORMS[name], lambda function: jax.vmap(jax.vmap(function))
    function = partial(kernel, params) if kernel else over_tokens(partial(norm.function, params))
    bare = {name: jnp.zeros_like(value) for name, value in params.items() if name == "bias"}
    return BoundNorm(
        function,
        over_tokens(partial(norm.lagrangian, params)),
        over_tokens(norm.sigma),
        over_tokens(partial(norm.function, bare)),
    )


def layer_norm(params: Params, x: Token) -> Token:
    """gamma * (x - mean) / sqrt(variance + eps) + b."""
    centred = x - jnp.mean(x)
    return _gain(params, centred * jax.lax.rsqrt(jnp.mean(centred**2) + EPSILON)) + params["bias"]


def deviation(x: Token) -> Scalar:
    """sqrt(variance + eps), the variance about the mean itself: no large numbers cancel."""
    return jnp.sqrt(jnp.mean((x - jnp.mean(x)) ** 2) + EPSILON)


def layer_norm_lagrangian(params: Params, x: Token) -> Scalar:
    """L(x) = D sqrt(variance(x) + eps) + b . x."""
    return x.shape[0] * deviation(x) + jnp.vdot(x, params["bias"])


def rms_norm(params: Params, x: Token) -> Token:
    """gamma * x / sqrt(mean(x^2) + eps)."""
    return _gain(params, x / root_mean_square(x))


def root_mean_square(x: Token) -> Scalar:
    """sqrt(mean(x^2) + eps)."""
    return jnp.sqrt(jnp.mean(x**2) + EPSILON)


def rms_norm_lagrangian(params: Params, x: Token) -> Scalar:
    """L(x) = D sqrt(mean(x^2) + eps)."""
    del params
    return x.shape[0] * root_mean_square(x)


def identity(params: Params, x: Token) -> Token:
    """g = x."""
    del params
    return x


def identity_lagrangian(params: Params, x: Token) -> Scalar:
    """L(x) = ||x||^2 / 2."""
    del params
    return 0.5 * jnp.sum(x**2)


def _gain(params: Params, normalized: Token) -> Token:
    return params["gain"] * normalized if "gain" in params else normalized


_GAIN, _BIAS = {"gain": constant(1.0, "D")}, {"bias": vector("D")}
_LAYER = (layer_norm, layer_norm_lagrangian, deviation)

NORMS.add("bare_layer_norm", Norm(*_LAYER, _BIAS, convex=True))
NORMS.add("layer_norm", Norm(*_LAYER, {**_GAIN, **_BIAS}, convex=True))
_RMS = (rms_norm, rms_norm_lagrangian, root_mean_square)
NORMS.add("rms_norm", Norm(*_RMS, _GAIN, convex=True))
_NONE = (identity, identity_lagrangian, lambda x: jnp.ones((), x.dtype))
NORMS.add("none", Norm(*_NONE, {}, convex=True))
