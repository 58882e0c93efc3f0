"""The exact (erf) GELU, gelu(z) = z Phi(z), with cheap first and second derivatives.

The gradient of an energy needs gelu' and the outer gradient gelu''. Training keeps only the
arguments z of the first and (z, u) of the product gelu'(z) u; every derivative is made again
from one erf and one exp.
"""

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def gelu(z: jax.Array) -> jax.Array:
    """`energies.gelu`: z Phi(z), elementwise."""
    return z * _cdf(z)


@jax.custom_vjp
def _slope_times(z, u):
    """gelu'(z) u"""
    return _slope(z) * u


def _slope_times_bwd(residuals, cotangent):
    z, u = residuals
    curvature = (2.0 - z * z) * _pdf(z)
    return curvature * u * cotangent, _slope(z) * cotangent


gelu.defvjp(lambda z: (gelu(z), z), lambda z, cotangent: (_slope_times(z, cotangent),))
_slope_times.defvjp(lambda z, u: (_slope_times(z, u), (z, u)), _slope_times_bwd)


def _slope(z):
    return _cdf(z) + z * _pdf(z)


def _cdf(z):
    return 0.5 * (1.0 + jax.lax.erf(z * np.sqrt(0.5).astype(z.dtype)))


def _pdf(z):
    return jnp.exp(-0.5 * z * z) * np.sqrt(0.5 / np.pi).astype(z.dtype)
