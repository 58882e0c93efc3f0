"""Measurements of descent along a trajectory: slopes, energy increases, and converged contexts.

With the context of token A held fixed, a small step changes its energy at the rate

    dE_A/dt = (dE_A/dx_A) . (move of A)

`core.certificates` states for which models this rate is guaranteed to be non-positive.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchEnergies, BatchStates
from nrgpt_jax.core.block import (
    Dynamics,
    EnergyAndGrad,
    block,
    energy_and_grad,
    start,
    update_cache,
)
from nrgpt_jax.core.descent import Trajectory, energy_in_context, grad_x

ROUNDING = 64.0  # units in the last place: smaller energy changes are rounding errors
SHORT = 1e-6  # length of the move that measures a slope in float64, relative to the state
UPHILL = 1e-6  # a slope is positive above this fraction of the steepest possible one
SCALES = tuple(2.0 ** (k / 4) for k in range(-48, 25))  # multiples of a model's step, 2^-12 to 64


class Evidence(NamedTuple):
    """The energy changes of the N tokens of B sequences along a trajectory of T steps."""

    slopes: Float[Array, "T B N"]  # dE_A/dt at the beginning of a step, context held fixed
    uphill: Bool[Array, "T B N"]  # whether the slope is positive beyond rounding
    changes: Float[Array, "T B N"]  # energy change of a step, context held fixed
    rises: Bool[Array, "T B N"]  # whether the change is positive beyond rounding
    largest_scales: Float[Array, "T B N"]  # see `evidence`
    context_converged: Bool[Array, "T B N"]  # whether the token's context had converged
    rises_converged: Bool[Array, "T B N"]  # whether the energy rose with a converged context


def evidence(
    dynamics_at: Callable[[Any], Dynamics],
    inputs: Any,
    path: Trajectory,
    *,
    tolerance: float = 1e-2,
) -> Evidence:
    """Measure descent at every step of a trajectory.

    `largest_scales` is the largest multiple of a token's own step up to which the energy falls at
    all multiples in `SCALES`. It is 0 if it does not fall at the shortest, infinity if it falls at
    all of them.

    Args:
      dynamics_at, inputs: as in `descent.trajectory`.
      path: the trajectory of these steps.
      tolerance: a context has converged if a step changes no g in it by more, relative. Its
        remaining motion changes energies too, so rises are measured for the token's own step only.
    """

    def at_step(step):
        inputs_t, (x, energies, _, _, move) = step
        dynamics = dynamics_at(inputs_t)
        energy_at = energy_in_context(dynamics, start(dynamics)._replace(x=x))
        gradient = jax.grad(lambda x: jnp.sum(energy_at(x)))(x)  # includes gates, unlike the path's
        slopes = jnp.sum(gradient * move, axis=-1)
        lengths = jnp.linalg.norm(move, axis=-1) + jnp.linalg.norm(x, axis=-1)  # x is rounded too
        steepest = jnp.linalg.norm(gradient, axis=-1) * lengths
        uphill = slopes > ROUNDING * jnp.finfo(x.dtype).eps * steepest
        terms = [jnp.abs(e) for name, e in energies.items() if name != "total"]
        size = jnp.sum(jnp.stack(terms), axis=0)
        resolution = ROUNDING * jnp.finfo(x.dtype).eps * size
        multiples = jnp.asarray(SCALES, x.dtype)
        after = jax.lax.map(lambda multiple: energy_at(x + multiple * move), multiples)
        changes = after - energies["total"][None]
        rises = ~(changes <= resolution[None])  # nan counts as a rise
        descending = jnp.sum(jnp.cumsum(rises, axis=0) == 0, axis=0)  # from the smallest scale on
        bounds = jnp.concatenate([jnp.zeros(1), multiples[:-1], jnp.full(1, jnp.inf)])
        unscaled = SCALES.index(1.0)
        g = dynamics.norm.function(x), dynamics.norm.function(x + move)
        speed = relative_speeds(jnp.stack(g))[0]
        return slopes, uphill, changes[unscaled], rises[unscaled], bounds[descending], speed

    steps = jax.tree.map(lambda leaf: leaf[:-1], path)
    *measured, speeds = jax.lax.map(at_step, (inputs, steps))
    strict = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs)).strict
    converged = context_converged(speeds, tolerance, strict=strict)
    slopes, uphill, changes, rises, largest = measured
    return Evidence(slopes, uphill, changes, rises, largest, converged, converged & rises)


def relative_speeds(g: Float[Array, "P B N D"]) -> Float[Array, "T B N"]:
    """Compute the relative change of g in every step, ||g(t+1) - g(t)|| / ||g(t)||.

    With a norm that ignores the length of x, a token converges in g = norm(x), the only input of
    the energies, while x may grow along its own direction without bound.
    """
    moved = jnp.linalg.norm(g[1:] - g[:-1], axis=-1)
    return moved / jnp.maximum(jnp.linalg.norm(g[:-1], axis=-1), jnp.finfo(g.dtype).tiny)


def context_converged(
    speeds: Float[Array, "T B N"], tolerance: float, *, strict: bool
) -> Bool[Array, "T B N"]:
    """Return whether the speed of every token in a token's context is at most `tolerance`, by step.

    An empty context counts as converged. A low speed does not prove convergence: as x grows, steps
    of equal length rotate it less and less.
    """
    converged = jax.lax.cumprod((speeds <= tolerance).astype(jnp.int32), axis=2) == 1
    if strict:
        converged = jnp.pad(converged[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
    return converged


def settling_steps(speeds: Float[Array, "T B N"], tolerance: float) -> Int[Array, "B N"]:
    """Return the step from which a token's speed stays within `tolerance`; T if it never does."""
    still = (speeds <= tolerance).astype(jnp.int32)
    return len(still) - jnp.sum(jnp.cumprod(still[::-1], axis=0), axis=0)


# Slopes from values, not from derivatives ----------------------------------------------------


def uphill_moves(
    dynamics_at: Callable[[Any], Dynamics], inputs: Any, states: Float[Array, "T B N D"]
) -> Bool[Array, "T B N"]:
    """Return whether a step begins uphill, context held fixed, by energy differences in float64.

    With a line search: whether it ends at a higher energy.

    Such a step contradicts a guarantee. Steps from states that the rule moves at zero gradient do
    not count: the first step of `sphere` projects onto the sphere. The rule must have no state
    between steps (rules with a state have no guarantee).

    Args:
      dynamics_at, inputs: as in `descent.trajectory`.
      states: states before each step.
    """

    def at_step(step):
        inputs_t, x = step
        dynamics = dynamics_at(inputs_t)
        state = start(dynamics)._replace(x=x)
        out = block(dynamics, state, inputs_t["scale"])[1]
        assert out.move is not None
        keys, _ = update_cache(dynamics, state, dynamics.norm.function(x))

        at = lambda x: energy_and_grad(dynamics, x, dynamics.norm.function(x), keys)
        if dynamics.line_search:  # a move may begin uphill, but ends no higher
            before, after = at(x), at(x + out.move)
            return after.total - before.total > rounding(after)
        rest = resting(dynamics, x)
        move, changes, noise = half_changes(at, x, out.move - rest)
        length = lambda x: jnp.linalg.norm(x, axis=-1)
        steepest = length(grad_x(dynamics, x, out.grad_g)) * length(move)
        return (changes > UPHILL * steepest + noise) & (length(rest) <= 1e-2 * length(x))

    return jax.lax.map(at_step, (inputs, states))


def resting(dynamics: Dynamics, x: BatchStates) -> BatchStates:
    """Return the move of the rule at zero gradient: zero, or the projection onto its constraint."""
    return dynamics.rule.update(jnp.zeros_like(x), dynamics.rule.init(x), x)[0].astype(x.dtype)


def half_changes(
    at: Callable[[BatchStates], EnergyAndGrad], x: BatchStates, along: BatchStates
) -> tuple[BatchStates, BatchEnergies, BatchEnergies]:
    """Return a short move along a direction, the first-order energy change, and its rounding error.

    Args:
      at: function from states to energies.
      x: states.
      along: direction of the move; a token with zero direction does not move.
    """
    length = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
    far = length(along)
    move = SHORT * length(x) * along / jnp.where(far > 0.0, far, 1.0)
    after, before = at(x + move), at(x - move)
    return move, (after.total - before.total) / 2, rounding(after)


def rounding(out: EnergyAndGrad) -> BatchEnergies:
    """The change of energies that may be rounding."""
    sizes = jnp.stack([jnp.abs(energy) for energy in out.energies.values()])
    return ROUNDING * jnp.finfo(out.x.dtype).eps * jnp.sum(sizes, axis=0)
