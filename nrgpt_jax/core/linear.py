"""Products of tokens with a weight matrix whose gradients need no transposed copies.

A weight is stored as (narrow, wide), for instance (D,M), and used both ways: `expand` multiplies
by it, `contract` by its transpose. The gradient of an energy uses each weight in both directions,
so the outer gradient has two terms for it. Automatic differentiation lays one of them out as
(wide, narrow) and adds its transpose; these rules lay out both as (narrow, wide), from
transposed narrow states instead of transposed wide activations.
"""

import jax
from jaxtyping import Array, Float

from nrgpt_jax.core import kernels

Narrow = Float[Array, "N D"]
Wide = Float[Array, "N M"]
Weight = Float[Array, "D M"]


def expand(x: Narrow, weight: Weight) -> Wide:
    """x W."""
    return x @ weight if kernels.plain() else _expand(x, weight)


def contract(x: Wide, weight: Weight) -> Narrow:
    """x W^T."""
    return x @ weight.T if kernels.plain() else _contract(x, weight)


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


def _weight_gradient(narrow: Narrow, wide: Wide) -> Weight:
    return jax.lax.dot_general(narrow, wide, (((0,), (0,)), ((), ())))


_expand.defvjp(lambda x, weight: (_expand(x, weight), (x, weight)), _expand_bwd)
_contract.defvjp(lambda x, weight: (_contract(x, weight), (x, weight)), _contract_bwd)
