"""The recurrent dynamics: tokens roll down their energies.

    g = norm(x)
    x <- x + c_t rule(dE/dg)        E_A: the energy of token A, from the terms of the model

One step is written once, `step`. Training makes T of them (`rollout`), a trajectory records
what each has seen, decoding keeps what energies remember of each token in a cache, and
`until_at_rest` makes as many as tokens need: each is that step in one of the two loops here,
which the transformer baselines use with a step of their own.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params
from nrgpt_jax.core import caches
from nrgpt_jax.core.contexts import Places, Surroundings
from nrgpt_jax.core.energies import COMBINATIONS, Combination
from nrgpt_jax.core.norms import BoundNorm
from nrgpt_jax.core.rules import RULES, BoundRule
from nrgpt_jax.core.terms import Term, combine

REMAT = ("none", "step", "full")


class Dynamics(NamedTuple):
    """What the tokens of B sequences do in one step, with all parameters bound."""

    terms: Mapping[str, Term]
    combination: Combination
    combination_params: Params
    norm: BoundNorm
    rule: BoundRule
    places: Places
    first: BatchStates  # their states before the first step


class State(NamedTuple):
    """Where tokens are, and what is remembered of them."""

    x: BatchStates
    rule: Any  # what the rule of descent keeps
    cache: Any  # by term, (T,B,S,...): memory of past tokens; None: of these alone
    step: Int[Array, ""]  # steps made


class Slope(NamedTuple):
    """How tokens stand on their energies: values by term and in total, gradient of the total."""

    energies: Mapping[str, BatchEnergies]
    total: BatchEnergies
    in_g: BatchStates  # dE_A/dg_A, what a rule follows
    move: BatchStates | None = None  # what a step adds to x


class Dropout(NamedTuple):
    """Dropout of attention energies' gradients in one step."""

    weights: Float[Array, "B H N K"]  # of the softmax, 0 or 1 / (1 - rate)
    output: BatchStates  # of the gradient in g, likewise


def assemble(
    terms: Mapping[str, Term],
    norm: BoundNorm,
    eta: jax.Array,
    places: Places,
    first: BatchStates,
    *,
    rule: str = "descent",
    rule_params: Params | None = None,
    combination: str = "sum",
    combination_params: Params | None = None,
) -> Dynamics:
    """The dynamics of bound parts.

    Args:
      terms: by name, of `terms.bind`.
      norm: of `norms.bind_norm`.
      eta: the inference rate: (), (D,) or (D,D).
      places: where tokens stand and what they see.
      first: (B,N,D) states before the first step.
      rule, combination: names in `RULES` and `COMBINATIONS`, with their parameters.
    """
    bound_rule = RULES[rule].make(rule_params or {}, eta, norm)
    how = COMBINATIONS[combination]
    return Dynamics(terms, how, combination_params or {}, norm, bound_rule, places, first)


def start(dynamics: Dynamics, cache: Any = None) -> State:
    """The state before the first step."""
    x = dynamics.first
    return State(x, dynamics.rule.init(x), cache, jnp.zeros((), jnp.int32))


def step(
    dynamics: Dynamics,
    state: State,
    scale: Float[Array, ""] | float = 1.0,
    dropout: Dropout | None = None,
) -> tuple[State, Slope]:
    """One step of every token down its energy, and the slope that it followed.

    What the terms remember of these tokens is written into the cache first, so that each token
    finds itself there; without a cache the tokens are their own context.
    """
    g = dynamics.norm.function(state.x)
    memories, cache = remember(dynamics, state, g)
    seen = slope(dynamics, state.x, g, memories, dropout)
    move, rule_state = dynamics.rule.update(seen.in_g, state.rule, state.x)
    move = scale * move.astype(state.x.dtype)
    new = State(state.x + move, rule_state, cache, state.step + 1)
    return new, seen._replace(move=move)


def remember(dynamics: Dynamics, state: State, g: BatchStates) -> tuple[dict[str, Any], Any]:
    """What terms keep of the tokens that can be seen, (B,K,...) by name, and the cache with it."""
    positions = jnp.broadcast_to(dynamics.places.positions(g.shape[1]), g.shape[:2])
    own = {n: t.memory(g, positions) for n, t in dynamics.terms.items() if t.memory}
    if state.cache is None:
        return own, None
    cache = {
        name: caches.write(rows, own[name], dynamics.places.at, step=caches.slot(rows, state.step))
        for name, rows in state.cache.items()
    }
    if dynamics.places.at is None:  # these are the first tokens: nothing else is in the cache
        return own, cache
    return {n: rows[caches.slot(rows, state.step)] for n, rows in cache.items()}, cache


def slope(
    dynamics: Dynamics,
    x: BatchStates,
    g: BatchStates,
    memories: Mapping[str, Any],
    dropout: Dropout | None = None,
) -> Slope:
    """Energies and their gradient at states x, g = norm(x), with these memories around them."""
    lagrangian = dynamics.norm.lagrangian(x)
    around = Surroundings(None, dynamics.places, x, dynamics.first, lagrangian)
    slopes = {}
    for name, term in dynamics.terms.items():
        here = around._replace(memory=memories.get(name))
        energy, gradient = term.slope(g, here)
        if dropout is not None and term.dropped:
            gradient = dropout.output * term.dropped(g, here, dropout.weights).astype(g.dtype)
        slopes[name] = energy, gradient
    total, in_g = combine(dynamics.combination, dynamics.combination_params, slopes)
    return Slope({name: energy for name, (energy, _) in slopes.items()}, total, in_g)


def in_states(dynamics: Dynamics, x: BatchStates, in_g: BatchStates) -> BatchStates:
    """dE_A/dx_A from dE_A/dg_A, through the norm."""
    return jax.vjp(dynamics.norm.function, x)[1](in_g.astype(x.dtype))[0]


def held_energy(dynamics: Dynamics, held: State) -> Callable[[BatchStates], BatchEnergies]:
    """The energy (B,N) of tokens at any states x (B,N,D), their context held where it is."""
    memories, _ = remember(dynamics, held, dynamics.norm.function(held.x))

    def energy_at(x: BatchStates) -> BatchEnergies:
        return slope(dynamics, x, dynamics.norm.function(x), memories).total

    return energy_at


class Trajectory(NamedTuple):
    """States, energies and their gradients before every step and after the last one.

    `energies` are those of every token by term, and their `total`. `gradients` are dE_A/dx_A of
    the total: of token A's own energy in its own state, with its context held fixed. `moves` are
    what the steps from there add to the states, the last of them not made.
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

    def record(dynamics: Dynamics, state: State, seen: Slope) -> Trajectory:
        assert seen.move is not None
        energies = {**seen.energies, "total": seen.total}
        return Trajectory(state.x, energies, in_states(dynamics, state.x, seen.in_g), seen.move)

    def recorded(state: State, inputs_t: Any):
        dynamics = dynamics_at(inputs_t)
        new, seen = step(dynamics, state, inputs_t["scale"])
        return new, record(dynamics, state, seen)

    first, last = (jax.tree.map(lambda leaf, at=at: leaf[at], inputs) for at in (0, -1))
    state, path = rollout(recorded, start(dynamics_at(first)), inputs)
    end = recorded(state, last)[1]  # on the landscape of the last step
    return jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), path, end)


def settle(
    dynamics_at: Callable[[Any], Dynamics], inputs: Any, state: State, fixed_point: bool
) -> State:
    """The state with what is remembered of tokens that move no more.

    Their last states are written for every step from `state.step` on that they did not make, or
    for the only one of a fixed-point cache.
    """

    def at(t: Int[Array, ""], state: State) -> State:
        dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[t], inputs))
        here = state._replace(step=t)
        _, cache = remember(dynamics, here, dynamics.norm.function(state.x))
        return state._replace(cache=cache)

    most = len(jax.tree.leaves(inputs)[0])
    if fixed_point:
        return at(jnp.asarray(most - 1), state)
    return jax.lax.fori_loop(state.step, most, at, state)


# The two loops ------------------------------------------------------------------------------------

Step = Callable[[State, Any], tuple[State, Any]]
"""(state, what is of this step alone) -> (state, what was seen)."""


def rollout(
    step: Step,
    state: State,
    inputs: Any,
    *,
    unroll: int = 1,
    remat: str = "none",
) -> tuple[State, Any]:
    """The state after T steps, and what each has seen: one `lax.scan`, one compiled step.

    Args:
      step: as `Step`; what it has seen may be None.
      state: before the first step.
      inputs: a tree of arrays with T in front: scales, parameters of distinct blocks, keys.
      unroll: this many steps are compiled as one: the same values, without copies of what is
        kept for the gradient, at the price of compilation time.
      remat: what training keeps. `none`: everything it needs. `step`: the state before each
        step, the rest is computed again. `full`: the states at about sqrt(T) steps.
    """

    body = step if remat == "none" else jax.checkpoint(step)
    steps = lambda state, inputs: jax.lax.scan(body, state, inputs, unroll=unroll)
    if remat == "full":
        length = len(jax.tree.leaves(inputs)[0])
        chunk = math.isqrt(length)
        whole = length // chunk * chunk
        split = lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:])
        state = jax.lax.scan(jax.checkpoint(steps), state, jax.tree.map(split, inputs))[0]
        inputs = jax.tree.map(lambda a: a[whole:], inputs)
    return steps(state, inputs)


class Convergence(NamedTuple):
    """When a token has come to rest and stops.

    `energy`: a step changed its energy by at most the tolerance. `gradient`: the gradient of its
    energy in its state, dE_A/dx_A, has at most that norm. Both are of the token alone, so how
    far a token goes never depends on what follows it.
    """

    tolerance: float = 1e-3
    criterion: str = "energy"


CRITERIA = ("energy", "gradient")


def until_at_rest(
    step: Step,
    slope_in_x: Callable[[State, Any, Any], BatchStates],
    state: State,
    inputs: Any,
    moving: Array,
    until: Convergence,
) -> tuple[State, Int[Array, "B N"]]:
    """At most T steps; every token stops when it has come to rest.

    Args:
      step, state, inputs: as of `rollout`; what a step has seen is a `Slope`.
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
        new, seen = step(state, inputs_t)
        if until.criterion == "energy":
            at_rest = jnp.abs(seen.total - before_BxN) <= until.tolerance
        else:
            in_x = slope_in_x(state, inputs_t, seen)
            at_rest = jnp.linalg.norm(in_x, axis=-1) <= until.tolerance
        moving_BxN &= ~at_rest
        stays = lambda new, old: jnp.where(moving_BxN[..., None], new, old)
        x, rule = jax.tree.map(stays, (new.x, new.rule), (state.x, state.rule))
        new = new._replace(x=x, rule=rule)
        return new, seen.total, steps_BxN + moving_BxN.astype(jnp.int32), moving_BxN

    nowhere = jnp.full(moving.shape, jnp.inf, jnp.float32)
    carry = (state, nowhere, jnp.zeros(moving.shape, jnp.int32), moving)
    state, _, steps, _ = jax.lax.while_loop(unfinished, body, carry)
    return state, steps
