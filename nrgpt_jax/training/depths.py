"""Training at many depths, so that more steps than trained do no harm.

In each training step the number of recurrent steps is drawn anew, for the whole batch or for each
sequence. The gradient may go through the last few of them alone: those before are then made
without being remembered, so that depth costs no memory; in exact arithmetic and with one step, at
a fixed point, this is the first term of the series of the implicit gradient. The loss is that of
the last state, or the mean over the last few, and, with `held`, over further descents, in each of
which a token sees the others where the one before has ended: what a fixed-point cache shows a token
that is decoded. With `held_before` some of these come before all others without being remembered.
With `decoded` the tokens behind a prompt, of a length that is drawn anew up to half of the text,
are decoded so, one by one, and the gradient goes through all of it.
Steps without a gradient, and those of decoded tokens, are made without dropout.
One penalty pushes one more step towards a contraction, another (`consistency`) consecutive descents
towards each other: where two of them end in the same states, all further ones do.
Sources: random depth in Geiping et al. (arXiv 2502.05171); one-step gradients in Fung et al.
(arXiv 2103.12803); the penalty on the Jacobian in Bai et al. (arXiv 2106.14342), there on the
whole of it, here on each token's own block.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import BatchStates, Key, PerSequence, Tokens
from nrgpt_jax.core.dynamics import Walk
from nrgpt_jax.core.step import State
from nrgpt_jax.models import LanguageModel

DISTRIBUTIONS = ("fixed", "uniform", "log_uniform")
EACH = ("batch", "sequence")
# Folded into the key of a training step, which dropout has too.
_OF_OTHERS, _OF_DEPTH, _OF_PENALTY, _OF_PROMPT = 0, 1, 2, 3
_OF_WALK = 3  # plus the number of the walk, which begins at 1


class Depth(NamedTuple):
    """The fields of `config.depth`, with 0 replaced by what it stands for."""

    distribution: str
    least: int
    most: int
    each: str
    growth_steps: int
    gradient_steps: int
    loss_steps: int
    held: int
    held_before: int
    decoded: bool
    consistency: float
    penalty: float
    penalty_bound: float


class Made(NamedTuple):
    """What a training step looks at."""

    states: list[BatchStates]  # those at which the loss is taken
    penalty: Float[Array, "B N"] | None  # what is added to the loss of each token


def of_config(config: Mapping[str, Any]) -> Depth | None:
    """The settings of a configuration; None: all steps, always, and the last state's loss."""
    fields, steps = config["depth"], config["model"]["num_steps"]
    fixed = fields["distribution"] == "fixed"
    least = steps if fixed else fields["least"] or 1
    most = steps if fixed else fields["most"] or 2 * steps
    whole = fields["gradient_steps"] or most
    depth = Depth(**{**fields, "least": least, "most": most, "gradient_steps": min(whole, most)})
    plain = fixed and depth.gradient_steps == steps and depth.loss_steps == 1
    plain = plain and not (depth.penalty or depth.held or depth.decoded)
    return None if plain else depth


def draw(
    depth: Depth, key: Key, rows: PerSequence, step: Int[Array, ""]
) -> Int[Array, ""] | Int[Array, "B"]:
    """The number of recurrent steps: (), or (B,) of each row of a batch.

    The greatest that is drawn grows with the training step for `growth_steps` of them: by equal
    numbers of steps, or, where the distribution is log-uniform, by equal factors.
    """
    grown = jnp.minimum(1.0, (step + 1) / max(depth.growth_steps, 1))
    by_factors = depth.distribution == "log_uniform"
    if by_factors:
        most = jnp.round(depth.least * (depth.most / depth.least) ** grown)
    else:
        most = jnp.round(depth.least + grown * (depth.most - depth.least))

    def one(key: Key) -> jax.Array:
        u = jax.random.uniform(key)
        if by_factors:
            drawn = depth.least * jnp.exp(u * jnp.log((most + 1) / depth.least))
        else:
            drawn = depth.least + u * (most - depth.least + 1)
        return jnp.minimum(drawn, most).astype(jnp.int32)

    key = jax.random.fold_in(key, _OF_DEPTH)
    if depth.each == "batch":
        return one(key)
    return jax.vmap(lambda row: one(jax.random.fold_in(key, row)))(jnp.asarray(rows))


def make_states(
    params: Any,
    model: LanguageModel,
    tokens: Tokens,
    rows: PerSequence,
    key: Key,
    depth: Depth,
    step: Int[Array, ""],
) -> Made:
    """Makes a drawn number of steps.

    Args:
      params, model: as of `create_model`.
      tokens: (B,N).
      rows: (B,) numbers of the sequences in the whole batch.
      key: of a training step.
      depth: how deep, and how it is learned from.
      step: training steps that were made.
    """
    count = draw(depth, key, rows, step)

    def apply(model: LanguageModel, walk: Walk, number: int = 0) -> State:
        rngs = {"dropout": jax.random.fold_in(key, _OF_WALK + number) if number else key}
        given = tokens, walk, True, rows
        return cast(State, model.apply({"params": params}, *given, method="walk", rngs=rngs))

    begin, forgotten = None, {"params": jax.lax.stop_gradient(params)}
    if depth.gradient_steps < depth.most:
        before = jnp.maximum(count - depth.gradient_steps, 0)
        found = model.apply(forgotten, tokens, before, method="run")
        begin, count = cast(State, found), count - before
    whole = model.clone(num_steps=depth.gradient_steps)
    first = model.clone(num_steps=depth.gradient_steps - depth.loss_steps + 1)
    always = depth.least == depth.most  # then all of them are made
    left_out = None if always else jnp.maximum(depth.gradient_steps - count, 0)
    held = lambda context: Walk(left_out=left_out, context=context)
    alone = lambda: apply(first, Walk(begin, left_out))
    end: Any = lambda context: whole.apply(forgotten, tokens, held(context), method="walk")
    after = lambda context: apply(first, held(context))
    most = depth.held_before
    ends = [_after_drawn(most, key, end, after, alone) if most else alone()]
    for number in range(1, depth.loss_steps):
        ends.append(apply(model.clone(num_steps=1), Walk(ends[-1]), number))
    last = len(ends) - 1
    for number in range(depth.loss_steps, depth.loss_steps + depth.held):
        ends.append(apply(whole, held(ends[-1]), number))
    penalty = _penalty(params, model, tokens, ends[last:], rows, key, depth)
    decoded = [_decoded(params, model, tokens, ends[last], key)] if depth.decoded else []
    return Made([end.x for end in ends] + decoded, penalty)


def _decoded(
    params: Any, model: LanguageModel, tokens: Tokens, end: State, key: Key
) -> BatchStates:
    """Where tokens are that are decoded behind a prompt of a drawn length."""
    most = max(1, tokens.shape[1] // 2)
    prompt = jax.random.randint(jax.random.fold_in(key, _OF_PROMPT), (), 1, most + 1)
    return cast(Any, model.apply({"params": params}, tokens, end, prompt, method="decoded"))


def _after_drawn(
    most: int,
    key: Key,
    end: Callable[[State | None], State],
    after: Callable[[State], State],
    alone: Callable[[], State],
) -> State:
    """`after` the end of so many descents, each held where the one before has ended; without one
    `alone`."""
    count = jax.random.randint(jax.random.fold_in(key, _OF_OTHERS), (), 0, most + 1)
    ends = lambda: jax.lax.fori_loop(1, count, lambda _, context: end(context), end(None))
    return jax.lax.cond(count > 0, lambda: after(ends()), alone)


def _penalty(
    params: Any,
    model: LanguageModel,
    tokens: Tokens,
    ends: list[State],
    rows: PerSequence,
    key: Key,
    depth: Depth,
) -> Float[Array, "B N"] | None:
    """What is added to the loss of each token; `ends` are those of descents, each held after the
    one before."""
    parts = []
    if depth.penalty:
        gain = _gain(params, model, tokens, ends[0], rows, jax.random.fold_in(key, _OF_PENALTY))
        parts.append(depth.penalty * jnp.maximum(gain - depth.penalty_bound, 0.0) ** 2)
    if depth.consistency:
        apart = lambda *xs: model.apply({"params": params}, *xs, method="squared_distance")
        found = [apart(before.x, after.x) for before, after in itertools.pairwise(ends)]
        parts.append(depth.consistency * jnp.mean(jnp.stack(cast(Any, found)), axis=0))
    return sum(parts[1:], parts[0]) if parts else None


def _gain(
    params: Any, model: LanguageModel, tokens: Tokens, end: State, rows: PerSequence, key: Key
) -> Float[Array, "B N"]:
    """||J v|| / ||v|| of one more step, J of each token and v random."""
    of_row = lambda row: jax.random.normal(jax.random.fold_in(key, row), end.x.shape[1:])
    v, plain = jax.vmap(of_row)(jnp.asarray(rows)), model.with_kernels("plain")  # in forward mode
    return cast(jax.Array, plain.apply({"params": params}, tokens, end, v, method="gain_of"))
