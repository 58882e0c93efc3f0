"""Rollouts besides T steps for all tokens: recorded, truncated, adaptive, in a held context.

`trajectory` is a rollout that records the results of each step. `adaptive_rollout` runs as many
steps as tokens need, `rollout_n` any number of equal steps, and `skip_first` omits the first steps.
All use the steps of `core.block`; the transformer baselines use these loops with their own step.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchEnergies, BatchStates
from nrgpt_jax.core.block import (
    Dynamics,
    State,
    Step,
    block,
    energy_and_grad,
    rollout,
    start,
    update_cache,
)


class RolloutOptions(NamedTuple):
    """The initial state and the number of steps of a rollout; by default all steps from the start.

    Steps are omitted at the beginning, so that all sequences end together.
    """

    begin: State | None = None
    # For all sequences, or for each.
    num_skipped_steps: Int[Array, ""] | Int[Array, "B"] | None = None
    context: State | None = None  # source of the keys in all steps; None: the current states


class Trajectory(NamedTuple):
    """States, energies and their gradients before every step and after the last one.

    `energies` hold the energy of every token by term, and their `total`. `grad_g` and `grad_x` are
    dE_A/dg_A and dE_A/dx_A of the total, which the rule follows. They are gradients in token A's
    own state, with its context held fixed and without the contribution of a gate
    (`core.energies.Energy.exact`). `moves` are the updates computed at these states; the last one
    is not applied.
    """

    states: Float[Array, "T+1 B N D"]
    energies: Mapping[str, Float[Array, "T+1 B N"]]
    grad_g: Float[Array, "T+1 B N D"]
    grad_x: Float[Array, "T+1 B N D"]
    moves: Float[Array, "T+1 B N D"]


def grad_x(dynamics: Dynamics, x: BatchStates, grad_g: BatchStates) -> BatchStates:
    """Compute dE_A/dx_A from dE_A/dg_A by backpropagation through the norm."""
    return jax.vjp(dynamics.norm.function, x)[1](grad_g.astype(x.dtype))[0]


def trajectory(dynamics_at: Callable[[Any], Dynamics], inputs: Any) -> Trajectory:
    """Run T steps and record states, energies, gradients and moves.

    Args:
      dynamics_at: function from the inputs of a step to its dynamics.
      inputs: tree of arrays with leading axis T: `scale`, and the inputs of `dynamics_at`.
    """

    def recorded(state: State, inputs_t: Any) -> tuple[State, Trajectory]:
        dynamics = dynamics_at(inputs_t)
        new, out = block(dynamics, state, inputs_t["scale"])
        assert out.move is not None
        energies = {**out.energies, "total": out.total}
        of_x = grad_x(dynamics, state.x, out.grad_g)
        return new, Trajectory(state.x, energies, out.grad_g, of_x, out.move)

    first, last = (jax.tree.map(lambda leaf, at=at: leaf[at], inputs) for at in (0, -1))
    state, path = rollout(recorded, start(dynamics_at(first)), inputs)
    end = recorded(state, last)[1]  # with the energies of the last step
    return jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), path, end)


def write_final_states(
    dynamics_at: Callable[[Any], Dynamics], inputs: Any, state: State, fixed_point: bool
) -> State:
    """Return the state with the keys of the final token states in its cache.

    They fill the steps from `state.step` on, which were not run, or the single step of a
    fixed-point cache.
    """

    def at(t: Int[Array, ""], state: State) -> State:
        dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[t], inputs))
        here = state._replace(step=t)
        _, cache = update_cache(dynamics, here, dynamics.norm.function(state.x))
        return state._replace(cache=cache)

    max_steps = len(jax.tree.leaves(inputs)[0])
    if fixed_point:
        return at(jnp.asarray(max_steps - 1), state)
    return jax.lax.fori_loop(state.step, max_steps, at, state)


# A held context -----------------------------------------------------------------------------------


def block_in_context(
    dynamics: Dynamics, context: State, scale: Float[Array, ""] | float = 1.0
) -> Callable[[BatchStates], BatchStates]:
    """Return a function from states x (B,N,D) to those after a step, with keys held at `context`.

    The held keys include the token's own if the mask is inclusive.
    """
    keys, _ = update_cache(dynamics, context, dynamics.norm.function(context.x))

    return lambda x: block(dynamics, context._replace(x=x), scale, keys=keys)[0].x


def energy_in_context(dynamics: Dynamics, context: State) -> Callable[[BatchStates], BatchEnergies]:
    """Return a function from states x (B,N,D) to energies (B,N), with keys held at `context`."""
    keys, _ = update_cache(dynamics, context, dynamics.norm.function(context.x))

    return lambda x: energy_and_grad(dynamics, x, dynamics.norm.function(x), keys).total


# Numbers of steps ---------------------------------------------------------------------------------


def skip_first(make_step: Step, inputs: Any, num_skipped_steps: jax.Array) -> tuple[Step, Any]:
    """Return a step and its inputs for a rollout without its first `num_skipped_steps`, () or (B,).

    Skipped steps leave the states unchanged; the record of every step is None.
    """
    count = len(jax.tree.leaves(inputs)[0])
    return _late(make_step, num_skipped_steps), (jnp.arange(count), inputs)


def _late(make_step: Step, num_skipped_steps: jax.Array) -> Step:
    """Return a step that leaves the states unchanged before step `num_skipped_steps`."""

    def step(state: State, numbered: tuple[jax.Array, Any]) -> tuple[State, Any]:
        number, inputs_t = numbered
        if num_skipped_steps.ndim == 0:  # skipped steps cost no time
            stay = lambda state, inputs_t: (state, None)
            return jax.lax.cond(number >= num_skipped_steps, make_step, stay, state, inputs_t)
        moving = jnp.broadcast_to((number >= num_skipped_steps)[:, None], state.x.shape[:2])
        new, _ = make_step(state, inputs_t)
        return jax.tree.map(partial(_of_moving, moving), new, state), None

    return step


def rollout_n(make_step: Step, state: State, inputs_t: Any, count: jax.Array) -> State:
    """Return the state after `count` equal steps, () or (B,) for each sequence.

    The result has no gradient.
    """
    max_steps = jnp.max(count)
    step = _late(make_step, max_steps - count)
    return jax.lax.fori_loop(0, max_steps, lambda n, state: step(state, (n, inputs_t))[0], state)


class Convergence(NamedTuple):
    """The criterion by which a token has converged and stops.

    `energy`: a step changed its energy by at most the tolerance. `gradient`: the norm of dE_A/dx_A,
    the gradient of its energy in its state, is at most the tolerance. `state`: the next step would
    change its state by at most the tolerance, relative: ||x(t+1) - x(t)|| <= tolerance ||x(t)||.
    All concern the token alone, so its number of steps never depends on later tokens. The state of
    the rule (a velocity) is not tested. An energy can be stationary by chance, far from a minimum.
    """

    tolerance: float = 1e-3
    criterion: str = "energy"


CRITERIA = ("energy", "gradient", "state")


def _of_moving(moving: Bool[Array, "B N"], new: jax.Array, old: jax.Array) -> jax.Array:
    """Return new values for moving tokens and old ones for others; a count is always new."""
    if new.shape[:2] != moving.shape:
        return new
    return jnp.where(moving.reshape(*moving.shape, *[1] * (new.ndim - 2)), new, old)


def adaptive_rollout(
    make_step: Step,
    gradient_at: Callable[[State, Any, Any], BatchStates],
    state: State,
    inputs: Any,
    moving: Array,
    stopping: Convergence,
) -> tuple[State, Int[Array, "B N"]]:
    """Run at most T steps; every token stops once it has converged.

    Args:
      make_step, state, inputs: as in `rollout`; the record of a step is an `EnergyAndGrad`.
      gradient_at: function from a state, the inputs of a step and its record to dE_A/dx_A.
      moving: (B,N) bool, tokens that have to converge; False for padding.
      stopping: the convergence criterion.

    Returns:
      The state, and the number of steps (B,N) of each token.
    """
    max_steps = len(jax.tree.leaves(inputs)[0])

    def unfinished(carry):
        state, _, _, moving_BxN = carry
        return (state.step < max_steps) & jnp.any(moving_BxN)

    def body(carry):
        state, before_BxN, steps_BxN, moving_BxN = carry
        inputs_t = jax.tree.map(lambda a: a[state.step], inputs)
        new, out = make_step(state, inputs_t)
        if stopping.criterion == "energy":
            converged = jnp.abs(out.total - before_BxN) <= stopping.tolerance
        elif stopping.criterion == "state":
            length = partial(jnp.linalg.norm, axis=-1)
            converged = length(new.x - state.x) <= stopping.tolerance * length(state.x)
        else:
            gradient = gradient_at(state, inputs_t, out)
            converged = jnp.linalg.norm(gradient, axis=-1) <= stopping.tolerance
        moving_BxN &= ~converged
        stays = partial(_of_moving, moving_BxN)
        x, rule = jax.tree.map(stays, (new.x, new.rule), (state.x, state.rule))
        new = new._replace(x=x, rule=rule)
        return new, out.total, steps_BxN + moving_BxN.astype(jnp.int32), moving_BxN

    nowhere = jnp.full(moving.shape, jnp.inf, state.x.dtype)
    carry = (state, nowhere, jnp.zeros(moving.shape, jnp.int32), moving)
    state, _, steps, _ = jax.lax.while_loop(unfinished, body, carry)
    return state, steps
