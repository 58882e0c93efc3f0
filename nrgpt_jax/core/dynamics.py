"""The recurrent dynamics: one step (`core.step`), in three loops.

`rollout` runs T steps by one `lax.scan`: in training, in prefill and when tokens are decoded from a
KV cache; `trajectory` is a rollout that records what each step computed. `adaptive_rollout` runs as
many steps as tokens need, `rollout_n` any number of equal ones. The transformer baselines use the
same loops with a step of their own.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchStates
from nrgpt_jax.core.step import Dynamics, EnergyAndGrad, State, in_states, start, step, update_cache

REMAT = ("none", "step", "full")


class Trajectory(NamedTuple):
    """States, energies and their gradients before every step and after the last one.

    `energies` are those of every token by term, and their `total`. `gradients` are dE_A/dx_A of
    the total: of token A's own energy in its own state, with its context held fixed, and without
    what a gate (`core.energies.Energy.exact`) adds to it: what a rule follows. `moves` are what
    the steps from there add to the states, the last of them not made.
    """

    states: Float[Array, "T+1 B N D"]
    energies: Mapping[str, Float[Array, "T+1 B N"]]
    gradients: Float[Array, "T+1 B N D"]
    moves: Float[Array, "T+1 B N D"]


def trajectory(dynamics_at: Callable[[Any], Dynamics], inputs: Any) -> Trajectory:
    """The whole path of T steps, with the energies and gradients on it.

    Args:
      dynamics_at: of a step, from its inputs.
      inputs: of all steps, a tree of arrays with T in front: `scale`, and what `dynamics_at` reads.
    """

    def record(dynamics: Dynamics, state: State, seen: EnergyAndGrad) -> Trajectory:
        assert seen.move is not None
        energies = {**seen.energies, "total": seen.total}
        return Trajectory(state.x, energies, in_states(dynamics, state.x, seen.grad_g), seen.move)

    def recorded(state: State, inputs_t: Any):
        dynamics = dynamics_at(inputs_t)
        new, seen = step(dynamics, state, inputs_t["scale"])
        return new, record(dynamics, state, seen)

    first, last = (jax.tree.map(lambda leaf, at=at: leaf[at], inputs) for at in (0, -1))
    state, path = rollout(recorded, start(dynamics_at(first)), inputs)
    end = recorded(state, last)[1]  # on the landscape of the last step
    return jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), path, end)


def write_final_states(
    dynamics_at: Callable[[Any], Dynamics], inputs: Any, state: State, fixed_point: bool
) -> State:
    """The state with what is remembered of tokens that move no more.

    Their last states are written for every step from `state.step` on that they did not make, or
    for the only one of a fixed-point cache.
    """

    def at(t: Int[Array, ""], state: State) -> State:
        dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[t], inputs))
        here = state._replace(step=t)
        _, cache = update_cache(dynamics, here, dynamics.norm.function(state.x))
        return state._replace(cache=cache)

    most = len(jax.tree.leaves(inputs)[0])
    if fixed_point:
        return at(jnp.asarray(most - 1), state)
    return jax.lax.fori_loop(state.step, most, at, state)


# The loops ----------------------------------------------------------------------------------------

Step = Callable[[State, Any], tuple[State, Any]]
"""(state, what is of this step alone) -> (state, what was seen)."""


class RolloutOptions(NamedTuple):
    """Where a rollout begins, and how many of its steps are made; by default all, from the start.

    Steps are left out at the beginning, so that all sequences end together.
    """

    begin: State | None = None
    # Of all sequences, or of each.
    num_skipped_steps: Int[Array, ""] | Int[Array, "B"] | None = None
    context: State | None = None  # where tokens are seen, in all steps; None: where they are then


def rollout(
    make_step: Step,
    state: State,
    inputs: Any,
    *,
    unroll: int = 1,
    remat: str = "none",
    num_skipped_steps: jax.Array | None = None,
) -> tuple[State, Any]:
    """The state after T steps, and what each has seen: one `lax.scan`, one compiled step.

    Args:
      make_step: as `Step`; what it has seen may be None.
      state: before the first step.
      inputs: a tree of arrays with T in front: scales, parameters of distinct blocks, keys.
      unroll: this many steps are compiled as one: the same values, without copies of what is
        kept for the gradient, at the price of compilation time.
      remat: what training keeps. `none`: everything it needs. `step`: the state before each
        step, the rest is computed again. `full`: the states at about sqrt(T) steps.
      num_skipped_steps: as of a `RolloutOptions`; what steps have seen must then be None.
    """
    if num_skipped_steps is not None:
        count = len(jax.tree.leaves(inputs)[0])
        make_step, inputs = _late(make_step, num_skipped_steps), (jnp.arange(count), inputs)
    body = make_step if remat == "none" else jax.checkpoint(make_step)
    steps = lambda state, inputs: jax.lax.scan(body, state, inputs, unroll=unroll)
    if remat != "full":
        return steps(state, inputs)
    length = len(jax.tree.leaves(inputs)[0])
    chunk = math.isqrt(length)
    whole = length // chunk * chunk
    split = lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:])
    state, first = jax.lax.scan(jax.checkpoint(steps), state, jax.tree.map(split, inputs))
    state, last = steps(state, jax.tree.map(lambda a: a[whole:], inputs))
    joined = lambda a, b: jnp.concatenate([a.reshape(-1, *b.shape[1:]), b])
    return state, jax.tree.map(joined, first, last)


def _late(make_step: Step, num_skipped_steps: jax.Array) -> Step:
    """The same step from number `num_skipped_steps` on; before, states stay as they are."""

    def step(state: State, numbered: tuple[jax.Array, Any]) -> tuple[State, Any]:
        number, inputs_t = numbered
        if num_skipped_steps.ndim == 0:  # no time is spent on it
            stay = lambda state, inputs_t: (state, None)
            return jax.lax.cond(number >= num_skipped_steps, make_step, stay, state, inputs_t)
        moving = jnp.broadcast_to((number >= num_skipped_steps)[:, None], state.x.shape[:2])
        new, _ = make_step(state, inputs_t)
        return jax.tree.map(partial(_of_moving, moving), new, state), None

    return step


def rollout_n(make_step: Step, state: State, inputs_t: Any, count: jax.Array) -> State:
    """The state after `count` steps, () or (B,) of each sequence, that are all alike.

    There is no gradient of it.
    """
    most = jnp.max(count)
    step = _late(make_step, most - count)
    return jax.lax.fori_loop(0, most, lambda n, state: step(state, (n, inputs_t))[0], state)


class Convergence(NamedTuple):
    """When a token has come to rest and stops.

    `energy`: a step changed its energy by at most the tolerance. `gradient`: the gradient of its
    energy in its state, dE_A/dx_A, has at most that norm. `state`: the next step would change its
    state by at most so much of its length, ||x(t+1) - x(t)|| <= tolerance ||x(t)||. All are of
    the token alone, so how far a token goes never depends on what follows it. What a rule keeps (a
    velocity) is not asked. An energy can stand still by chance, half-way up or down.
    """

    tolerance: float = 1e-3
    criterion: str = "energy"


CRITERIA = ("energy", "gradient", "state")


def _of_moving(moving: Bool[Array, "B N"], new: jax.Array, old: jax.Array) -> jax.Array:
    """New values of the tokens that move; of what is not of tokens (a count) the new value."""
    if new.shape[:2] != moving.shape:
        return new
    return jnp.where(moving.reshape(*moving.shape, *[1] * (new.ndim - 2)), new, old)


def adaptive_rollout(
    make_step: Step,
    slope_in_x: Callable[[State, Any, Any], BatchStates],
    state: State,
    inputs: Any,
    moving: Array,
    until: Convergence,
) -> tuple[State, Int[Array, "B N"]]:
    """At most T steps; every token stops when it has come to rest.

    Args:
      make_step, state, inputs: as of `rollout`; what a step has seen is an `EnergyAndGrad`.
      slope_in_x: dE_A/dx_A from a state, the inputs of a step and what it has seen.
      moving: (B,N) bool, tokens that are waited for; padding is not.
      until: when a token stops.

    Returns:
      The state, and the number of steps that each token made.
    """
    most = len(jax.tree.leaves(inputs)[0])

    def unfinished(carry):
        state, _, _, moving_BxN = carry
        return (state.step < most) & jnp.any(moving_BxN)

    def body(carry):
        state, before_BxN, steps_BxN, moving_BxN = carry
        inputs_t = jax.tree.map(lambda a: a[state.step], inputs)
        new, seen = make_step(state, inputs_t)
        if until.criterion == "energy":
            at_rest = jnp.abs(seen.total - before_BxN) <= until.tolerance
        elif until.criterion == "state":
            length = partial(jnp.linalg.norm, axis=-1)
            at_rest = length(new.x - state.x) <= until.tolerance * length(state.x)
        else:
            grad_x = slope_in_x(state, inputs_t, seen)
            at_rest = jnp.linalg.norm(grad_x, axis=-1) <= until.tolerance
        moving_BxN &= ~at_rest
        stays = partial(_of_moving, moving_BxN)
        x, rule = jax.tree.map(stays, (new.x, new.rule), (state.x, state.rule))
        new = new._replace(x=x, rule=rule)
        return new, seen.total, steps_BxN + moving_BxN.astype(jnp.int32), moving_BxN

    nowhere = jnp.full(moving.shape, jnp.inf, jnp.float32)
    carry = (state, nowhere, jnp.zeros(moving.shape, jnp.int32), moving)
    state, _, steps, _ = jax.lax.while_loop(unfinished, body, carry)
    return state, steps
