"""The one step: tokens roll down their energies.

    g = norm(x)
    x <- x + c_t rule(dE/dg)        E_A: the energy of token A, from the terms of the model

Training, reading, decoding and trajectories all make it (`core.dynamics`); with a cache in its
state it sees past tokens there, without one the tokens are their own context.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params
from nrgpt_jax.core import caches
from nrgpt_jax.core.combinations import COMBINATIONS, Combination
from nrgpt_jax.core.contexts import BatchContext, CausalMask
from nrgpt_jax.core.norms import BoundNorm
from nrgpt_jax.core.rules import RULES, BoundRule
from nrgpt_jax.core.terms import Term, combine


class Dynamics(NamedTuple):
    """What the tokens of B sequences do in one step, with all parameters bound."""

    terms: Mapping[str, Term]
    combination: Combination
    combination_params: Params
    norm: BoundNorm
    rule: BoundRule
    causal_mask: CausalMask
    first: BatchStates  # their states before the first step


class State(NamedTuple):
    """Where tokens are, and what is remembered of them."""

    x: BatchStates
    rule: Any  # what the rule of descent keeps
    cache: Any  # by term, (T,B,S,...): memory of past tokens; None: of these alone
    step: Int[Array, ""]  # steps made


class EnergyAndGrad(NamedTuple):
    """How tokens stand on their energies: values by term and in total, gradient of the total."""

    energies: Mapping[str, BatchEnergies]
    total: BatchEnergies
    grad_g: BatchStates  # dE_A/dg_A, what a rule follows
    move: BatchStates | None = None  # what a step adds to x


class Dropout(NamedTuple):
    """Dropout of attention energies' gradients in one step."""

    weights: Float[Array, "B H N K"]  # of the softmax, 0 or 1 / (1 - rate)
    output: BatchStates  # of the gradient in g, likewise


def assemble(
    terms: Mapping[str, Term],
    norm: BoundNorm,
    eta: jax.Array,
    causal_mask: CausalMask,
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
      causal_mask: positions of the tokens, and which tokens they see.
      first: (B,N,D) states before the first step.
      rule, combination: names in `RULES` and `COMBINATIONS`, with their parameters.
    """
    bound_rule = RULES[rule].make(rule_params or {}, eta, norm)
    how = COMBINATIONS[combination]
    return Dynamics(terms, how, combination_params or {}, norm, bound_rule, causal_mask, first)


def start(dynamics: Dynamics, cache: Any = None) -> State:
    """The state before the first step."""
    x = dynamics.first
    return State(x, dynamics.rule.init(x), cache, jnp.zeros((), jnp.int32))


def step(
    dynamics: Dynamics,
    state: State,
    scale: Float[Array, ""] | float = 1.0,
    dropout: Dropout | None = None,
    held: Mapping[str, Any] | None = None,
) -> tuple[State, EnergyAndGrad]:
    """One step of every token down its energy, and the slope that it followed.

    What the terms remember of these tokens is written into the cache first, so that each token
    finds itself there; without a cache the tokens are their own context, or what is `held`.
    """
    with jax.named_scope("norm"):
        g = dynamics.norm.function(state.x)
    with jax.named_scope("energies"):
        memories, cache = update_cache(dynamics, state, g) if held is None else (held, None)
        seen = slope(dynamics, state.x, g, memories, dropout)
    with jax.named_scope("rule"):
        move, rule_state = dynamics.rule.update(seen.grad_g, state.rule, state.x)
        move = scale * move.astype(state.x.dtype)
    new = State(state.x + move, rule_state, cache, state.step + 1)
    return new, seen._replace(move=move)


def update_cache(dynamics: Dynamics, state: State, g: BatchStates) -> tuple[dict[str, Any], Any]:
    """What terms keep of the tokens that can be seen, (B,K,...) by name, and the cache with it."""
    positions = jnp.broadcast_to(dynamics.causal_mask.positions(g.shape[1]), g.shape[:2])
    own = {n: t.memory(g, positions) for n, t in dynamics.terms.items() if t.memory}
    if state.cache is None:
        return own, None
    cache = {
        name: caches.write(
            rows, own[name], dynamics.causal_mask.at, step=caches.slot(rows, state.step)
        )
        for name, rows in state.cache.items()
    }
    if dynamics.causal_mask.at is None:  # these are the first tokens: nothing else is in the cache
        return own, cache
    return {n: rows[caches.slot(rows, state.step)] for n, rows in cache.items()}, cache


def slope(
    dynamics: Dynamics,
    x: BatchStates,
    g: BatchStates,
    memories: Mapping[str, Any],
    dropout: Dropout | None = None,
) -> EnergyAndGrad:
    """Energies and their gradient at states x, g = norm(x), with these memories around them."""
    lagrangian = dynamics.norm.lagrangian(x)
    around = BatchContext(None, dynamics.causal_mask, x, dynamics.first, lagrangian, g)
    slopes = {}
    # Those that remember nothing come first: CPUs decode batches some percent faster in this order.
    for name, term in sorted(dynamics.terms.items(), key=lambda named: bool(named[1].memory)):
        here = around._replace(memory=memories.get(name))
        energy, gradient = term.slope(g, here)
        if dropout is not None and term.dropped:
            gradient = dropout.output * term.dropped(g, here, dropout.weights).astype(g.dtype)
        slopes[name] = energy, gradient
    slopes = {name: slopes[name] for name in dynamics.terms}
    total, grad_g = combine(dynamics.combination, dynamics.combination_params, slopes)
    return EnergyAndGrad({name: energy for name, (energy, _) in slopes.items()}, total, grad_g)


def in_states(dynamics: Dynamics, x: BatchStates, grad_g: BatchStates) -> BatchStates:
    """dE_A/dx_A from dE_A/dg_A, through the norm."""
    return jax.vjp(dynamics.norm.function, x)[1](grad_g.astype(x.dtype))[0]


def held_step(
    dynamics: Dynamics, held: State, scale: Float[Array, ""] | float = 1.0
) -> Callable[[BatchStates], BatchStates]:
    """The states (B,N,D) that a step leads to from x (B,N,D), the context held where it is.

    The context holds the token itself where the mask is inclusive.
    """
    memories, _ = update_cache(dynamics, held, dynamics.norm.function(held.x))

    return lambda x: step(dynamics, held._replace(x=x), scale, held=memories)[0].x


def held_energy(dynamics: Dynamics, held: State) -> Callable[[BatchStates], BatchEnergies]:
    """The energy (B,N) of tokens at any states x (B,N,D), their context held where it is."""
    memories, _ = update_cache(dynamics, held, dynamics.norm.function(held.x))

    def energy_at(x: BatchStates) -> BatchEnergies:
        return slope(dynamics, x, dynamics.norm.function(x), memories).total

    return energy_at
