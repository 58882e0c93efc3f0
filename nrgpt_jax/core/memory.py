"""What is kept of past tokens while text is made: rows of arrays, one row a token.

A cache array is (T,B,S,...): for every step, sequence and slot what attention reads of a token
before that step. The token at position i of its sequence has slot i.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def write(
    rows: jax.Array,
    values: Float[Array, "B P *C"],
    position: Int[Array, "B"] | None = None,
    *,
    step: Int[Array, ""] | int | None = None,
) -> jax.Array:
    """Rows (B,S,...), or the rows of one step of (T,B,S,...), with values written.

    Args:
      rows: the cache.
      values: of P tokens a sequence.
      position: None writes positions 0 to P-1 of every sequence; (B,) writes one token (P = 1)
        at a position of its own in each.
      step: which of T, where `rows` has that axis.
    """
    step_index = () if step is None else (step,)
    if position is None:
        where: tuple = (slice(None), slice(values.shape[1]))
    else:
        where, values = (jnp.arange(position.shape[0]), position), values[:, 0]
    return rows.at[(*step_index, *where)].set(values.astype(rows.dtype))


def fill(
    rows: Float[Array, "T B S *C"],
    values: Float[Array, "B P *C"],
    position: Int[Array, "B"] | None,
    first: Int[Array, ""],
) -> Float[Array, "T B S *C"]:
    """`write` for step `first` and every later one: of tokens that have come to rest."""
    each = lambda step, rows: write(rows, values, position, step=step)
    return jax.lax.fori_loop(first, len(rows), each, rows)
