"""What a trajectory shows of descent: slopes, rises, and tokens that are slow.

With the context of token A held fixed, a small step changes its energy at the rate

    dE_A/dt = (dE_A/dx_A) . (move of A)

`core.certificates` says of which models that is promised to be non-positive.
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

ROUNDING = 64.0  # units in the last place: a smaller change of an energy is rounding
SHORT = 1e-6  # of the length of a state: how far it is moved to measure a slope, in float64
UPHILL = 1e-6  # a slope is positive beyond so much of the steepest there could be
SCALES = tuple(2.0 ** (k / 4) for k in range(-48, 25))  # 2^-12 to 64, times a model's own step


class Evidence(NamedTuple):
    """What a trajectory of T steps does to the energy of each of N tokens of B sequences."""

    slopes: Float[Array, "T B N"]  # dE_A/dt at the beginning of a step, context held fixed
    uphill: Bool[Array, "T B N"]  # whether that is positive, beyond rounding
    changes: Float[Array, "T B N"]  # of the energy in a step, context held fixed
    rises: Bool[Array, "T B N"]  # whether that change is positive, beyond rounding
    largest_scales: Float[Array, "T B N"]  # see `evidence`
    context_converged: Bool[Array, "T B N"]  # whether no token of its context moved in a step
    rises_converged: Bool[Array, "T B N"]  # whether the energy rose in a step where that was so


def evidence(
    dynamics_at: Callable[[Any], Dynamics],
    inputs: Any,
    path: Trajectory,
    *,
    tolerance: float = 1e-2,
) -> Evidence:
    """Measures descent at every step of a trajectory.

    `largest_scales` are how many times longer than the model's own each step of each token could
    be for the energy to fall there and for all shorter steps that were tried (`SCALES`); 0 where
    it does not even fall at the shortest, infinity where it falls at all of them.

    Args:
      dynamics_at, inputs: of the steps, as for `dynamics.trajectory`.
      path: their trajectory.
      tolerance: a context is converged in a step that changes no g in it by more, relative. What
        little it still moves changes energies as well, so rises are those by a token's own step.
    """

    def at_step(step):
        inputs_t, (x, energies, _, _, move) = step
        dynamics = dynamics_at(inputs_t)
        energy_at = energy_in_context(dynamics, start(dynamics)._replace(x=x))
        gradient = jax.grad(lambda x: jnp.sum(energy_at(x)))(x)  # of gates too, unlike the path's
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
        rises = ~(changes <= resolution[None])  # what is not a number has not fallen
        descending = jnp.sum(jnp.cumsum(rises, axis=0) == 0, axis=0)  # from the least scale on
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
    """How far a step moves each token, relative: ||g(t+1) - g(t)|| / ||g(t)||.

    Behind a norm that ignores the length of x a token converges in g = norm(x), which is all
    that energies see, while x may continue in its own direction for ever.
    """
    moved = jnp.linalg.norm(g[1:] - g[:-1], axis=-1)
    return moved / jnp.maximum(jnp.linalg.norm(g[:-1], axis=-1), jnp.finfo(g.dtype).tiny)


def context_converged(
    speeds: Float[Array, "T B N"], tolerance: float, *, strict: bool
) -> Bool[Array, "T B N"]:
    """Whether no token of a token's context was faster than `tolerance` in a step.

    An empty context is converged. Slow is not yet converged: as x grows, steps of the same length
    turn it less and less.
    """
    converged = jax.lax.cumprod((speeds <= tolerance).astype(jnp.int32), axis=2) == 1
    if strict:
        converged = jnp.pad(converged[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
    return converged


def settling_steps(speeds: Float[Array, "T B N"], tolerance: float) -> Int[Array, "B N"]:
    """The first step after which a token is no faster; T where it has not converged."""
    still = (speeds <= tolerance).astype(jnp.int32)
    return len(still) - jnp.sum(jnp.cumprod(still[::-1], axis=0), axis=0)


# Slopes from values, not from derivatives ----------------------------------------------------


def uphill_moves(
    dynamics_at: Callable[[Any], Dynamics], inputs: Any, states: Float[Array, "T B N D"]
) -> Bool[Array, "T B N"]:
    """Whether a step begins uphill, its context held fixed; from values of energies, in float64.

    With a line search: whether it ends higher.

    A promise is contradicted where it does. Steps from states that the rule leaves without a
    gradient do not count: the first one of `sphere` goes to the sphere. The rule keeps no state
    between steps (nothing is promised of those that do).

    Args:
      dynamics_at, inputs: of the steps, as for `dynamics.trajectory`.
      states: before each step.
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
    """How the rule moves states that have no gradient: not at all, or to where it keeps them."""
    return dynamics.rule.update(jnp.zeros_like(x), dynamics.rule.init(x), x)[0].astype(x.dtype)


def half_changes(
    at: Callable[[BatchStates], EnergyAndGrad], x: BatchStates, along: BatchStates
) -> tuple[BatchStates, BatchEnergies, BatchEnergies]:
    """A short move along a direction, the change of energies to first order, and its rounding.

    Args:
      at: energies at states.
      x: states.
      along: where to; a token without a direction stays.
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
