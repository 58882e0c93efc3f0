"""LayerNorm with a gradient in closed form, in as few passes over the states as there can be.

    y = (x - mean) / sigma            dx = (dy - mean(dy) - y mean(dy y)) / sigma

The variance is of the centred states (two passes), so that no large numbers cancel.
"""

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import BatchStates, Params
from nrgpt_jax.core.norms import EPSILON


def layer_norm(params: Params, x: BatchStates) -> BatchStates:
    """`norms.layer_norm` of every token."""
    y = _normalize(x)
    if "gain" in params:
        y = params["gain"][None, None] * y
    return y + params["bias"][None, None]


@jax.custom_vjp
def _normalize(x):
    return _normalized(x)[0]


def _normalized(x):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
    return centred * factor, factor


def _normalize_fwd(x):
    y, factor = _normalized(x)
    return y, (y, factor)


def _normalize_bwd(residuals, dy):
    y, factor = residuals
    mean = lambda z: jnp.mean(z, axis=-1, keepdims=True)
    return (factor * (dy - mean(dy) - y * mean(dy * y)),)


_normalize.defvjp(_normalize_fwd, _normalize_bwd)
