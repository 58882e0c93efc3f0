"""Products of tokens with a weight matrix whose gradients need no transposed copies.

A weight is stored as (narrow, wide), for instance (D,M), and used both ways: `expand` multiplies
by it, `contract` by its transpose. The gradient of an energy uses each weight in both directions,
so the outer gradient has two terms for it. Automatic differentiation lays one of them out as
(wide, narrow) and adds its transpose; these rules lay out both as (narrow, wide), from
transposed narrow states instead of transposed wide activations.
"""

import jax
from jaxtyping import Array, Float

Narrow = Float[Array, "B N D"]
Wide = Float[Array, "B N M"]
Weight = Float[Array, "D M"]


@jax.custom_vjp
def expand(x: Narrow, weight: Weight) -> Wide:
    """x W."""
    return x @ weight


@jax.custom_vjp
def contract(x: Wide, weight: Weight) -> Narrow:
    """x W^T."""
    return x @ weight.T


def _expand_bwd(residuals, cotangent):
    x, weight = residuals
    return contract(cotangent, weight), _weight_gradient(x, cotangent)


def _contract_bwd(residuals, cotangent):
    x, weight = residuals
    return expand(cotangent, weight), _weight_gradient(cotangent, x)


def _weight_gradient(narrow: Narrow, wide: Wide) -> Weight:
    return jax.lax.dot_general(narrow, wide, (((0, 1), (0, 1)), ((), ())))


expand.defvjp(lambda x, weight: (expand(x, weight), (x, weight)), _expand_bwd)
contract.defvjp(lambda x, weight: (contract(x, weight), (x, weight)), _contract_bwd)
