"""A backtracking line search: no step raises the energy of a token in its context."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import BatchEnergies, BatchStates


def line_search(
    energy_at: Callable[[BatchStates], BatchEnergies],
    x: BatchStates,
    move: BatchStates,
    energy: BatchEnergies,
    halvings: int,
) -> BatchEnergies:
    """Return the share of its move (B,N) that each token takes: 1, 1/2, 1/4, ..., or 0.

    The share is the largest one after which the token's energy is no higher than before; there is
    no condition on the slope. Shares are constants for the outer gradient.

    Args:
      energy_at: energies (B,N) at states (B,N,D), with the context held fixed.
      x: states before the step.
      move: update of the step.
      energy: energies at x.
      halvings: number of times that a move is halved before it is refused.
    """
    with jax.named_scope("line_search"):
        x, move, energy = jax.lax.stop_gradient((x, move, energy))
        share = jnp.zeros_like(energy)
        for n in reversed(range(halvings + 1)):
            share = jnp.where(energy_at(x + 0.5**n * move) <= energy, 0.5**n, share)
        return jax.lax.stop_gradient(share).astype(x.dtype)
