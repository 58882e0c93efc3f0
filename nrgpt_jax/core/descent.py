"""Descent at inference: states roll down while what attention reads of them is remembered.

Two kinds of cache: `exact` keeps the memory of a token before every step, `fixed_point` only
that of its last state. Where a token has converged its memory no longer depends on the step, so
one row serves all steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import States
from nrgpt_jax.core import memory
from nrgpt_jax.core.dynamics import Dynamics, add, move, slope, step

CACHES = ("exact", "fixed_point")
CRITERIA = ("energy", "gradient")


class Convergence(NamedTuple):
    """When a token has come to rest and stops.

    `energy`: a step changed its energy by at most the tolerance. `gradient`: the gradient of its
    energy in its state, dE_A/dx_A, has at most that norm. Both are of the token alone, so how
    far a token goes never depends on what follows it.
    """

    tolerance: float = 1e-3
    criterion: str = "energy"


class Decoding(NamedTuple):
    """How tokens descend while text is made."""

    cache: str = "exact"  # one of CACHES
    until: Convergence | None = None  # None: every token makes all steps


class Descent(NamedTuple):
    """Where N tokens ended, what is remembered of them, and how many steps each made."""

    states: States
    rows: Float[Array, "T B S *C"]
    steps: Int[Array, "N"]


def descend(
    bind: Callable[[Float[Array, "B S *C"]], Dynamics],
    remember: Callable[[States], Float[Array, "B P *C"]],
    x: States,
    scales: Float[Array, "T"],
    rows: Float[Array, "T B S *C"],
    position: Int[Array, "B"] | None,
    decoding: Decoding,
    active: Bool[Array, "N"] | None = None,
    unroll: int = 1,
) -> Descent:
    """T = len(scales) steps, or fewer, of tokens (B*P,D).

    Args:
      bind: the dynamics of a step, given the rows of that step, these tokens' own included.
      remember: what attention reads of tokens in a state x.
      x: states before the first step.
      scales: c_t of every step.
      rows: the cache; (1,B,S,...) for a fixed-point cache.
      position: where to write, as in `memory.write`.
      decoding: which cache, and when to stop.
      active: tokens that are waited for; padding is not. None: all.
      unroll: as in `dynamics.rollout`.
    """
    fixed_point = decoding.cache == "fixed_point"

    def bound(t, x, rows):
        slot = 0 if fixed_point else t
        rows = memory.write(rows, remember(x), position, step=slot)
        return rows, bind(rows[slot])

    if decoding.until is None:

        def body(carry, t_and_scale):
            x, rows = carry
            rows, dynamics = bound(t_and_scale[0], x, rows)
            return (step(dynamics, x, t_and_scale[1]), rows), None

        inputs = jnp.arange(len(scales)), scales
        (x, rows), _ = jax.lax.scan(body, (x, rows), inputs, unroll=unroll)
        steps = jnp.full(x.shape[0], len(scales))
    else:
        moving = jnp.ones(x.shape[0], bool) if active is None else active
        x, rows, steps, made = _until_converged(bound, x, scales, rows, moving, decoding.until)
        if not fixed_point:
            rows = memory.fill(rows, remember(x), position, made)
    if fixed_point:
        rows = memory.write(rows, remember(x), position, step=0)
    return Descent(x, rows, steps)


def _until_converged(bound, x, scales, rows, moving, until: Convergence):
    """A loop that ends when every token has stopped."""

    def unfinished(carry):
        t, *_, moving_N = carry
        return (t < len(scales)) & jnp.any(moving_N)

    def body(carry):
        t, x, rows, before_N, steps_N, moving_N = carry
        rows, dynamics = bound(t, x, rows)
        energies, in_g, in_x = slope(dynamics, x)
        energy_N = add(e.astype(jnp.float32) for e in energies.values())
        if until.criterion == "energy":
            rest_N = jnp.abs(energy_N - before_N) <= until.tolerance
        else:
            rest_N = jnp.linalg.norm(in_x, axis=-1) <= until.tolerance
        moving_N &= ~rest_N
        x = jnp.where(moving_N[:, None], move(dynamics, x, in_g, scales[t]), x)
        return t + 1, x, rows, energy_N, steps_N + moving_N.astype(steps_N.dtype), moving_N

    nowhere = jnp.full(x.shape[0], jnp.inf, jnp.float32)
    steps = jnp.zeros(x.shape[0], jnp.int32)
    carry = (0, x, rows, nowhere, steps, moving)
    made, x, rows, _, steps, _ = jax.lax.while_loop(unfinished, body, carry)
    return x, rows, steps, made
