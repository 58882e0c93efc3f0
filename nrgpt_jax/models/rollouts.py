"""Rollouts besides the T steps of `LanguageModel.forward`, for training and the study of depth.

Functions of a bound model: `model.apply(variables, tokens, ..., method=rollouts.partial_rollout)`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import BatchStates, PerSequence, Tokens
from nrgpt_jax.core.block import State, rollout, update_cache
from nrgpt_jax.core.descent import RolloutOptions, block_in_context, rollout_n, skip_first
from nrgpt_jax.core.norms import bind_norm


def partial_rollout(
    model: Any,
    tokens: Tokens | BatchStates,
    options: RolloutOptions,
    train: bool = False,
    rows: PerSequence | None = None,
) -> State:
    """Return the state after a rollout of at most T steps; other arguments as in `forward`.

    A held context needs a model with an energy.
    """
    x: Any = tokens if tokens.ndim == 3 else model.embed(tokens)
    keys = {}
    if options.context is not None:
        at = _first_dynamics(model, x)
        keys["keys"] = update_cache(at, options.context, at.norm.function(options.context.x))[0]
    state, inputs, step = model.steps(
        x, dropout_keys=model.dropout_keys(len(x), train, rows), **keys
    )
    if options.num_skipped_steps is not None:
        step, inputs = skip_first(step, inputs, options.num_skipped_steps)
    begin = state if options.begin is None else options.begin
    return rollout(step, begin, inputs, unroll=model.scan_unroll, remat=model.remat)[0]


def equal_steps(model: Any, tokens: Tokens, count: Int[Array, ""] | Int[Array, "B"]) -> State:
    """Return the state after any number of equal steps, without a gradient."""
    state, inputs, step = model.steps(model.embed(tokens))
    return rollout_n(step, state, jax.tree.map(lambda leaf: leaf[0], inputs), count)


def step_gain(model: Any, tokens: Tokens, state: State, v: BatchStates) -> Float[Array, "B N"]:
    """Compute ||J v|| / ||v|| of one more step, J each token's own with its context held fixed.

    It uses forward mode, so the model's implementation must be `autodiff`.
    """
    inputs, dynamics_at = model.dynamics(model.embed(tokens))
    last = jax.tree.map(lambda leaf: leaf[-1], inputs)
    step_at = block_in_context(dynamics_at(last), state, last["scale"])
    pushed = jax.jvp(step_at, (state.x,), (v.astype(state.x.dtype),))[1]
    return jnp.linalg.norm(pushed, axis=-1) / jnp.linalg.norm(v, axis=-1)


def squared_distance(model: Any, x: BatchStates, y: BatchStates) -> Float[Array, "B N"]:
    """Compute ||v - u||^2 / ||u||^2 of u = n(x), v = n(y), n the norm without gain and bias."""
    norm = bind_norm(model.norm, model.group_params("block")["norm"], "autodiff")
    u, v = norm.unit(x), norm.unit(y)
    return jnp.sum(jnp.square(v - u), axis=-1) / jnp.sum(jnp.square(u), axis=-1)


def _first_dynamics(model: Any, x: BatchStates) -> Any:
    inputs, dynamics_at = model.dynamics(x)
    return dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
