"""Decoding: the forward pass with a KV cache, by kind of cache and stopping criterion."""

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
    """The kind of KV cache in generation, and when a token stops its descent."""

    cache: str = "exact"  # one of block.CACHES
    stopping: Convergence | None = None  # None: every token takes all steps


def check_decoding(model: "LanguageModel", decoding: Decoding) -> None:
    """Raise UserError if the model does not support this decoding."""
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
    """Run the forward pass of P tokens per sequence with a KV cache.

    Args:
      model: bound model.
      tokens: (B,P), or their embeddings.
      cache: cache of past tokens, from `empty_cache`: always written, read if there is a position.
      position: as in `embed`.
      decoding: kind of cache and stopping criterion.
      active: tokens that have to converge; None: all.

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
    # With a fixed-point cache and a strict mask, a token reads the same keys in all of its steps.
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
    """Run the forward pass token by token, each in the context of those before it.

    Args:
      model: bound model.
      x: (B,N,D) embeddings.
      cache: cache of N slots, those of the prompt filled.
      decoding: kind of cache and stopping criterion.
      prompt: number of leading tokens per sequence that are not moved.

    Returns:
      The states after the last step, and the number of steps of every token.
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
    """Return the states of tokens decoded after a prompt, with a fixed-point cache.

    Args:
      model: bound model with an energy.
      tokens: (B,N).
      end: state after the usual rollout, whose states of the prompt are kept.
      prompt: number of prefilled tokens.
    """
    x, (rows, count) = model.embed(tokens), tokens.shape
    inputs, dynamics_at = model.dynamics(x)
    empty = model.empty_cache(rows, count, "fixed_point")
    cache = write_final_states(dynamics_at, inputs, end._replace(cache=empty), True).cache
    read = jnp.arange(count)[:, None] < prompt
    x = jnp.where(read, end.x, x)
    return decode_scan(model, x, cache, Decoding("fixed_point"), prompt)[0]
