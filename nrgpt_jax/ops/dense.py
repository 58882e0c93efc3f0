"""Operations over the last axis: matrix products, GELU, LayerNorm, rotary positions.

The gradient of an energy uses each weight in both directions, so the outer gradient has two terms
for it. Automatic differentiation lays one of them out as (wide, narrow) and adds its transpose. The
rules of `linear` and `linear_transpose` lay out both as (narrow, wide), the layout of the weights,
and transpose narrow states instead of wide activations. The rules save only their arguments.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EPSILON = 1e-5  # added to a variance
ROPE_BASE = 10_000.0
IMPLEMENTATIONS = ("fused", "blocked", "autodiff")
_current: ContextVar[str] = ContextVar("implementation", default=IMPLEMENTATIONS[0])

States = Float[Array, "*B D"]


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Set the implementation, one of `IMPLEMENTATIONS`, of functions traced inside this context.

    A separately jitted function keeps the implementation of its first trace.
    """
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def is_autodiff() -> bool:
    """Whether custom derivative rules are disabled."""
    return _current.get() == "autodiff"


def may_use_device() -> bool:
    """Whether accelerator kernels may be used."""
    return _current.get() == "fused"


def accumulator_type(x: jax.Array) -> jnp.dtype:
    """Return the dtype in which to accumulate products of x: float32, or that of x if wider."""
    return jnp.dtype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x.dtype


def at_least_float32(x: jax.Array) -> jax.Array:
    """Return x in float32 if its dtype is narrower, else unchanged."""
    return x.astype(accumulator_type(x))


def along_last_axis(vector: Float[Array, "D"], x: jax.Array) -> Float[Array, "*ones D"]:
    """Reshape a vector to broadcast over the rows of x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum_i a_i b_i over the last axis, accumulated in float32 at least."""
    product = a * b
    return jnp.sum(product, axis=-1, dtype=accumulator_type(product))


# Products with a matrix ---------------------------------------------------------------------------


def linear(
    x: States, weight: Float[Array, "D M"], bias: Float[Array, "M"] | None = None
) -> Float[Array, "*B M"]:
    """x W + b."""
    y = x @ weight if is_autodiff() else _expand(x, weight)
    return y if bias is None else y + along_last_axis(bias, y)


def linear_transpose(
    x: Float[Array, "*B M"], weight: Float[Array, "D M"], bias: Float[Array, "D"] | None = None
) -> States:
    """x W^T + b."""
    y = x @ weight.T if is_autodiff() else _contract(x, weight)
    return y if bias is None else y + along_last_axis(bias, y)


@jax.custom_vjp
def _expand(x, weight):
    return x @ weight


@jax.custom_vjp
def _contract(x, weight):
    return x @ weight.T


def _expand_bwd(residuals, cotangent):
    x, weight = residuals
    return _contract(cotangent, weight), _weight_gradient(x, cotangent)


def _contract_bwd(residuals, cotangent):
    x, weight = residuals
    return _expand(cotangent, weight), _weight_gradient(cotangent, x)


def _weight_gradient(narrow, wide):
    rows = tuple(range(narrow.ndim - 1))
    return jax.lax.dot_general(narrow, wide, ((rows, rows), ((), ())))


_expand.defvjp(lambda x, weight: (_expand(x, weight), (x, weight)), _expand_bwd)
_contract.defvjp(lambda x, weight: (_contract(x, weight), (x, weight)), _contract_bwd)


# GELU ---------------------------------------------------------------------------------------------


def gelu(z: jax.Array) -> jax.Array:
    """z Phi(z), elementwise, with Phi the normal cumulative distribution (the exact GELU)."""
    return _of_erf(z) if is_autodiff() else _gelu(z)


def _of_erf(z):
    return 0.5 * z * (1.0 + jax.lax.erf(z * np.sqrt(0.5).astype(z.dtype)))


_gelu = jax.custom_vjp(_of_erf)


@jax.custom_vjp
def _slope_times(z, u):
    """gelu'(z) u."""
    cdf = 0.5 * (1.0 + jax.lax.erf(z * np.sqrt(0.5).astype(z.dtype)))
    return (cdf + z * _pdf(z)) * u


def _slope_times_bwd(residuals, cotangent):
    z, u = residuals
    return (2.0 - z * z) * _pdf(z) * u * cotangent, _slope_times(z, cotangent)


def _pdf(z):
    return jnp.exp(-0.5 * z * z) * np.sqrt(0.5 / np.pi).astype(z.dtype)


_gelu.defvjp(lambda z: (_gelu(z), z), lambda z, cotangent: (_slope_times(z, cotangent),))
_slope_times.defvjp(lambda z, u: (_slope_times(z, u), (z, u)), _slope_times_bwd)


# LayerNorm ----------------------------------------------------------------------------------------


def standardize(x: States) -> States:
    """y = (x - mean) / sigma, sigma = sqrt(variance + eps): LayerNorm without gain and bias.

    The variance is that of the centred states (two passes), which avoids cancellation. Its
    derivative rule: dx = (dy - mean(dy) - y mean(dy y)) / sigma.
    """
    return _standardized(x)[0] if is_autodiff() else _standardize(x)


@jax.custom_vjp
def _standardize(x):
    return _standardized(x)[0]


def _standardized(x):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
    return centred * factor, factor


def _standardize_fwd(x):
    y, factor = _standardized(x)
    return y, (y, factor)


def _standardize_bwd(residuals, dy):
    y, factor = residuals
    mean, along = (jnp.mean(z, axis=-1, keepdims=True) for z in (dy, dy * y))
    return (factor * (dy - mean - y * along),)


_standardize.defvjp(_standardize_fwd, _standardize_bwd)


# Rotary positions ---------------------------------------------------------------------------------


def rotate(x: Float[Array, "*B Y"], position: jax.Array) -> Float[Array, "*B Y"]:
    """R_A x: rotate pairs of entries (i, i + Y/2) by A / 10000^(2i/Y); an odd last one stays.

    Positions A have the axes of x except the last, or axes of length one.

    Source: RoPE (arXiv 2104.09864), section 3.2, with the halves as pairs.
    """
    half, wide = x.shape[-1] // 2, accumulator_type(x)
    speed = jnp.asarray(ROPE_BASE ** (-np.arange(half) / max(half, 1)), wide)
    angle = position[..., None].astype(wide) * along_last_axis(speed, x)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(wide), x[..., half : 2 * half].astype(wide)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
