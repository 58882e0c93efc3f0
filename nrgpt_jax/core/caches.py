"""What is kept of past tokens while text is made: rows of arrays, one row a token.

A cache array is (T,B,S,...): for every step, sequence and slot what energies read of a token
before that step. The token at position i of its sequence has slot i. A fixed-point cache has
T = 1, and keeps the last state of a token alone: where a token has converged, its memory no
longer depends on the step, so one row serves all steps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import PerSequence

CACHES = ("exact", "fixed_point")


def slot(rows: jax.Array, step: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """The index of a step in rows (T,B,S,...)."""
    return 0 if len(rows) == 1 else step


def write(
    rows: jax.Array,
    values: Float[Array, "B P *C"],
    position: PerSequence | None = None,
    *,
    step: Int[Array, ""] | int | None = None,
) -> jax.Array:
    """Rows (T,B,S,...) with values written at one step, or those of one step (B,S,...).

    Args:
      rows: the cache.
      values: of P tokens a sequence.
      position: None writes positions 0 to P-1 of every sequence; (B,) writes one token (P = 1)
        at a position of its own in each.
      step: which of T, where `rows` have that axis.
    """
    if position is None:
        where: tuple = (slice(None), slice(values.shape[1]))
    else:
        where, values = (jnp.arange(position.shape[0]), position), values[:, 0]
    at_step = () if step is None else (step,)
    return rows.at[(*at_step, *where)].set(values.astype(rows.dtype))
