"""Decoding: the forward pass before a cache, in the ways that a model may be asked for."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchStates, PerSequence, Tokens
from nrgpt_jax.core.block import EnergyAndGrad, State, rollout
from nrgpt_jax.core.descent import Convergence, adaptive_rollout, grad_x, write_final_states
from nrgpt_jax.errors import UserError

if TYPE_CHECKING:
    from nrgpt_jax.models.language_model import LanguageModel


class Decoding(NamedTuple):
    """How tokens descend while text is made: which cache is kept, and when a token stops."""

    cache: str = "exact"  # one of block.CACHES
    stopping: Convergence | None = None  # None: every token makes all steps


def check_decoding(model: "LanguageModel", decoding: Decoding) -> None:
    """Raises UserError where the model cannot decode in this way."""
    if not model.has_energy and decoding != Decoding():
        raise UserError("this model has no energy: it has an exact cache and makes all steps")
    if model.num_distinct_layers > 1 and decoding != Decoding():
        raise UserError(
            f"{model.num_distinct_layers} layers have an energy and keys of their own: they "
            "make all steps, with cache=exact"
        )


def forward_cached(
    model: Any,
    tokens: Tokens | BatchStates,
    cache: Any,
    position: PerSequence | None,
    decoding: Decoding,
    active: Bool[Array, "B P"] | None = None,
) -> tuple[BatchStates, Any, Int[Array, "B P"]]:
    """The forward pass of P tokens a sequence, before a cache, in this way.

    Args:
      model: bound.
      tokens: (B,P), or their embeddings.
      cache: of past tokens, as of `empty_cache`: it is written, and read with a position.
      position: as of `embed`.
      decoding: which cache, and when a token stops.
      active: tokens that are waited for; None: all.

    Returns:
      The states after the last step, the cache, and the number of steps of every token.
    """
    x = tokens if tokens.ndim == 3 else model.embed(tokens, position)
    if decoding == Decoding():
        begin, inputs, step = model.steps(x, position, cache)
        state, _ = rollout(step, begin, inputs, unroll=model.scan_unroll)
        return state.x, state.cache, jnp.full(x.shape[:2], model.num_steps)
    check_decoding(model, decoding)
    inputs, dynamics_at = model.dynamics(x, position)
    fixed_point, stopping = decoding.cache == "fixed_point", decoding.stopping
    # A token that does not see itself finds the same keys there in all of its steps.
    hold = fixed_point and model.strict and position is not None
    keys = jax.tree.map(lambda rows: rows[0], cache) if hold else None
    options = None if hold else cache, None, None if stopping is None else _out, keys
    begin, of_steps, step = model.steps(x, position, *options)
    if stopping is None:
        state, _ = rollout(step, begin, of_steps, unroll=model.scan_unroll)
        steps = jnp.full(x.shape[:2], model.num_steps)
    else:
        gradient = lambda state, i, out: grad_x(dynamics_at(i), state.x, out.grad_g)
        moving = jnp.ones(x.shape[:2], bool) if active is None else active
        state, steps = adaptive_rollout(step, gradient, begin, of_steps, moving, stopping)
    if hold:
        state = state._replace(cache=cache)
    state = write_final_states(dynamics_at, inputs, state, fixed_point)
    return state.x, state.cache, steps


def _out(dynamics: Any, out: EnergyAndGrad) -> EnergyAndGrad:
    del dynamics
    return out


def decode_scan(
    model: Any,
    x: BatchStates,
    cache: Any,
    decoding: Decoding,
    prompt: Int[Array, ""] | int = 0,
) -> tuple[BatchStates, Int[Array, "B N"]]:
    """The forward pass of one token after the other, each in the context of those before.

    Args:
      model: bound.
      x: (B,N,D) embeddings.
      cache: of N slots, those of the prompt filled.
      decoding: which cache, and when a token stops.
      prompt: the first tokens of every sequence, that stay where they are.

    Returns:
      The states after the last step, and the number of steps that every token made.
    """
    stay = lambda cache, x, at: (x, cache, jnp.zeros(x.shape[:2], jnp.int32))
    move = lambda cache, x, at: forward_cached(model, x, cache, at, decoding)

    def one(cache: Any, inputs: tuple[jax.Array, jax.Array]):
        position, x = inputs
        at = jnp.full(len(x), position)
        x, cache, steps = jax.lax.cond(position >= prompt, move, stay, cache, x[:, None], at)
        return cache, (x[:, 0], steps[:, 0])

    body = one if model.remat == "none" else jax.checkpoint(one)
    inputs = jnp.arange(x.shape[1]), jnp.swapaxes(x, 0, 1)
    ends = jax.lax.scan(body, cache, inputs)[1]
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), ends)


def decode_behind(
    model: Any, tokens: Tokens, end: State, prompt: Int[Array, ""]
) -> Float[Array, "B N D"]:
    """Where tokens end that are decoded behind a prompt, with a fixed-point cache.

    Args:
      model: bound, with an energy.
      tokens: (B,N).
      end: of their usual descent, where those of the prompt stay.
      prompt: the number of tokens that are read at once.
    """
    x, (rows, count) = model.embed(tokens), tokens.shape
    inputs, dynamics_at = model.dynamics(x)
    empty = model.empty_cache(rows, count, "fixed_point")
    cache = write_final_states(dynamics_at, inputs, end._replace(cache=empty), True).cache
    read = jnp.arange(count)[:, None] < prompt
    x = jnp.where(read, end.x, x)
    return decode_scan(model, x, cache, Decoding("fixed_point"), prompt)[0]
