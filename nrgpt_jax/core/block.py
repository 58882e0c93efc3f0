"""The NRGPT block: every token takes one descent step on its own energy.

    g = norm(x)
    keys = the keys of every token                   written to the KV cache, if there is one
    grad_g = dE_A/dg_A                               E_A: energy of token A, its context held fixed
    x <- x + c_t rule(grad_g)                        -eta grad_g, or another rule

Training, prefill, decoding and trajectories use this block; `rollout` scans it. In decoding, tokens
read the keys of past tokens from the KV cache. Without a cache, the tokens are their own context.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax import ops
from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params, PerSequence
from nrgpt_jax.core.context import Context
from nrgpt_jax.core.energies import Energy
from nrgpt_jax.core.line_search import line_search
from nrgpt_jax.core.norms import BoundNorm
from nrgpt_jax.core.parameters import Specs, positive
from nrgpt_jax.core.rules import BoundRule
from nrgpt_jax.registry import Registry

REMAT = ("none", "step", "full")


class Combination(NamedTuple):
    """A function `(params, energies (E,)) -> ()` that combines the energies of a token's terms.

    `exact` declares that `jax.grad` gives the whole change of the result, as in `Energy`.
    """

    function: Callable[[Params, Float[Array, "E"]], jax.Array]
    specs: Specs
    exact: bool = False


COMBINATIONS: Registry[Combination] = Registry("combination of energies")


def combination(name: str, specs: Specs, *, exact: bool = False):
    """Register a way to combine energies, selectable as `config.model.combination`."""
    return COMBINATIONS.register(name, lambda function: Combination(function, specs, exact))


@combination("sum", {}, exact=True)
def total(params: Params, energies: Float[Array, "E"]) -> jax.Array:
    """E = sum_k E_k (the paper)."""
    del params
    return jnp.sum(energies)


@combination("mixture", {"tau": positive(1.0)}, exact=True)
def mixture(params: Params, energies: Float[Array, "E"]) -> jax.Array:
    """E = -tau log sum_k exp(-E_k / tau): the lowest term has the largest gradient weight."""
    return -params["tau"] * jax.nn.logsumexp(-energies / params["tau"])


class Term(NamedTuple):
    """An energy of a model with its parameters."""

    energy: Energy
    params: Params
    dtype: str  # of the computation
    key: Callable[[BatchStates, Int[Array, "B N"]], Any] | None  # (g, position) -> keys
    key_dtype: str


class Dynamics(NamedTuple):
    """The dynamics of the tokens of B sequences in one step, with all parameters bound."""

    terms: Mapping[str, Term]  # by name, as returned by `bind`
    norm: BoundNorm
    rule: BoundRule
    first: BatchStates  # states before the first step
    strict: bool = False  # whether a token is excluded from its own context
    position: PerSequence | None = None  # of the one token per sequence; None: 0 to N-1
    combination: Combination = COMBINATIONS["sum"]
    combination_params: Params = {}
    implementation: str = "fused"  # of the energies, one of `ops.IMPLEMENTATIONS`
    line_search: int = 0  # halvings of a move that raises a token's energy; 0: no line search


class State(NamedTuple):
    """The carry of a rollout: token states, the state of the rule, the KV cache and the step."""

    x: BatchStates
    rule: Any  # state of the descent rule, such as a velocity
    cache: Any  # KV cache: keys of past tokens by term, (T,B,S,...); None: no cache
    step: Int[Array, ""]  # number of steps taken


class EnergyAndGrad(NamedTuple):
    """Energies of tokens by term and in total, and the gradient of the total."""

    energies: Mapping[str, BatchEnergies]
    total: BatchEnergies
    grad_g: BatchStates  # dE_A/dg_A, the input of a rule
    x: BatchStates  # states at which they are evaluated
    keys: Mapping[str, Any]  # of the visible tokens, by term
    move: Any = None  # (B,N,D) update that a step adds to x


class Dropout(NamedTuple):
    """Dropout masks for the gradients of attention energies in one step: 0 or 1 / (1 - rate)."""

    weights: Float[Array, "B H N K"]  # mask of the softmax weights
    output: BatchStates  # mask of the gradient in g


def bind(energy: Energy, params: Params, dtype: str = "float32") -> Term:
    """Bind a registered energy to its parameters.

    Args:
      energy: an entry of `ENERGIES`.
      params: all parameters in its table.
      dtype: dtype of the computation, except for `wide` energies, and of the keys.
    """
    narrow = {n: value.astype(dtype) if value.ndim else value for n, value in params.items()}
    key = energy.key and partial(energy.key, narrow)
    if not energy.wide:
        return Term(energy, narrow, dtype, key, dtype)
    wide = dtype if jnp.finfo(dtype).bits >= 32 else "float32"
    return Term(energy, params, wide, key, dtype)


def start(dynamics: Dynamics, cache: Any = None) -> State:
    """Return the state before the first step."""
    x = dynamics.first
    return State(x, dynamics.rule.init(x), cache, jnp.zeros((), jnp.int32))


def block(
    dynamics: Dynamics,
    state: State,
    scale: Float[Array, ""] | float = 1.0,
    dropout: Dropout | None = None,
    keys: Mapping[str, Any] | None = None,
) -> tuple[State, EnergyAndGrad]:
    """Take one descent step for every token; return the new state, the energies and gradients.

    The keys of these tokens are written to the cache first, so that each token finds its own key
    there. Without a cache the context is `keys` if given, else the tokens themselves.
    """
    with jax.named_scope("norm"):
        g = dynamics.norm.function(state.x)
    with jax.named_scope("energies"):
        keys, cache = update_cache(dynamics, state, g) if keys is None else (keys, None)
        out = energy_and_grad(dynamics, state.x, g, keys, dropout)
    with jax.named_scope("rule"):
        move, rule_state = dynamics.rule.update(out.grad_g, state.rule, state.x)
        move = scale * move.astype(state.x.dtype)
    if dynamics.line_search:
        at = lambda x: energy_and_grad(dynamics, x, dynamics.norm.function(x), out.keys).total
        move *= line_search(at, state.x, move, out.total, dynamics.line_search)[..., None]
    new = State(state.x + move, rule_state, cache, state.step + 1)
    return new, out._replace(move=move)


def context_of(
    dynamics: Dynamics, x: BatchStates, g: BatchStates, dropout: jax.Array | None = None
) -> Context:
    """Return the context of the energies, without keys."""
    fields = positions(dynamics.position, g), x, dynamics.first, dynamics.norm.lagrangian(x), g
    return Context(None, dynamics.strict, *fields, dynamics.position is None, dropout)


def energy_and_grad(
    dynamics: Dynamics,
    x: BatchStates,
    g: BatchStates,
    keys: Mapping[str, Any],
    dropout: Dropout | None = None,
) -> EnergyAndGrad:
    """Compute E_A and dE_A/dg_A of every token, by `jax.grad` of the energies as defined.

    The context, including its keys, is not an argument of the gradient: it is held fixed in a step,
    and differentiated in training.

    Args:
      dynamics: dynamics of the step.
      x, g: states, and norm(x).
      keys: keys of the visible tokens by term, (B,K,...).
      dropout: dropout of the gradients of attention energies.
    """
    context = context_of(dynamics, x, g, None if dropout is None else dropout.weights)

    def total(g: BatchStates, g_attention: Any = None) -> tuple[jax.Array, EnergyAndGrad]:
        energies = {}
        for name, (energy, params, dtype, *_) in dynamics.terms.items():
            attends = g_attention is not None and energy.query is not None
            of_term = (g_attention if attends else g).astype(dtype)
            of_keys = context._replace(keys=keys.get(name))
            energies[name] = ops.at_least_float32(energy.function(params, of_term, of_keys))
        combined = partial(dynamics.combination.function, dynamics.combination_params)
        stacked = jnp.stack(list(energies.values()), axis=-1)
        values = jax.vmap(jax.vmap(combined))(stacked)
        return jnp.sum(values), EnergyAndGrad(energies, values, g, x, keys)

    with ops.implementation(dynamics.implementation):
        if dropout is None:
            grad_g, out = jax.grad(total, has_aux=True)(g)
            return out._replace(grad_g=grad_g)
        (grad_g, of_attention), out = jax.grad(total, (0, 1), has_aux=True)(g, g)
    return out._replace(grad_g=grad_g + dropout.output * of_attention)


# The KV cache -------------------------------------------------------------------------------------

# A cache array is (T,B,S,...): for every step, sequence and slot, the key of a token before that
# step. The token at position i has slot i. A fixed-point cache has T = 1 and holds the keys of the
# final states only: once a token has converged, its keys no longer depend on the step.
CACHES = ("exact", "fixed_point")


def positions(position: PerSequence | None, x: BatchStates) -> Int[Array, "B N"]:
    """Return the positions (B,N) of tokens x (B,N,D): 0 to N-1, or the given (B,) if N = 1."""
    if position is None:
        return jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    return jnp.asarray(position)[:, None]


def update_cache(dynamics: Dynamics, state: State, g: BatchStates) -> tuple[dict[str, Any], Any]:
    """Return the keys of the visible tokens, (B,K,...) by name, and the updated cache."""
    at = positions(dynamics.position, g)
    new = {n: t.key(g.astype(t.key_dtype), at) for n, t in dynamics.terms.items() if t.key}
    if state.cache is None:
        return new, None
    row = lambda rows: 0 if len(rows) == 1 else state.step
    write_row = lambda rows, new: write(rows, new, dynamics.position, step=row(rows))
    cache = jax.tree.map(write_row, state.cache, new)
    if dynamics.position is None:  # these are the first tokens: the cache holds no others
        return new, cache
    return jax.tree.map(lambda rows: rows[row(rows)], cache), cache


def write(
    rows: jax.Array,
    values: Float[Array, "B P *C"],
    position: PerSequence | None = None,
    *,
    step: Int[Array, ""] | int | None = None,
) -> jax.Array:
    """Write values into a cache array (T,B,S,...) at one step, or into one step (B,S,...).

    Args:
      rows: the cache array.
      values: values of P tokens per sequence.
      position: None writes positions 0 to P-1 of every sequence; (B,) writes one token (P = 1) per
        sequence, each at its own position.
      step: index of the step, if `rows` has a step axis.
    """
    if position is None:
        where: tuple = (slice(None), slice(values.shape[1]))
    else:
        where, values = (jnp.arange(position.shape[0]), position), values[:, 0]
    at_step = () if step is None else (step,)
    return rows.at[(*at_step, *where)].set(values.astype(rows.dtype))


# T steps ------------------------------------------------------------------------------------------

Step = Callable[[State, Any], tuple[State, Any]]  # (state, inputs) -> (state, record)


def rollout(
    make_step: Step, state: State, inputs: Any, *, unroll: int = 1, remat: str = "none"
) -> tuple[State, Any]:
    """Run T steps by one `lax.scan`; return the final state and the records of the steps.

    Args:
      make_step: a `Step`; its record may be None.
      state: state before the first step.
      inputs: tree of arrays with leading axis T: scales, blocks, dropout keys.
      unroll: number of steps compiled as one: the same values, without copies of the arrays saved
        for the gradient, but with a longer compilation.
      remat: what training saves for the gradient. `none`: everything it needs. `step`: the state
        before each step; the rest is recomputed. `full`: the states at about sqrt(T) steps.
    """
    body = make_step if remat == "none" else jax.checkpoint(make_step)
    if remat != "full":
        return jax.lax.scan(body, state, inputs, unroll=unroll)
    steps = lambda state, inputs: jax.lax.scan(body, state, inputs, unroll=unroll)
    length = len(jax.tree.leaves(inputs)[0])
    chunk = math.isqrt(length)
    complete = length // chunk * chunk
    split = lambda a: a[:complete].reshape(-1, chunk, *a.shape[1:])
    state, first = jax.lax.scan(jax.checkpoint(steps), state, jax.tree.map(split, inputs))
    state, last = steps(state, jax.tree.map(lambda a: a[complete:], inputs))
    joined = lambda a, b: jnp.concatenate([a.reshape(-1, *b.shape[1:]), b])
    return state, jax.tree.map(joined, first, last)
