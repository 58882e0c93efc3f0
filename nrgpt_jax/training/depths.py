"""Training with a varying number of recurrent steps (`config.depth`).

Each training step samples the number of recurrent steps, per batch or per sequence. Gradients may
be truncated to the last `backprop_steps`: earlier steps run under stop_gradient, so activation
memory does not grow with depth; one step at a fixed point is the Jacobian-free gradient. The loss
is that of the last state, or the mean over the last `loss_steps` states. With `refine_passes` it
also covers further passes, in each of which a token attends to the final states of the previous
pass, as in decoding with a fixed-point cache. `max_burn_in_passes` prepends k ~ U{0..n} such passes
without a gradient. `train_on_decoded` decodes the suffix of a text autoregressively after a prompt
of 1 to N/2 tokens, with the fixed-point cache, and backpropagates through it. Dropout acts neither
on decoded tokens nor on steps without a gradient.
One penalty pushes a further step towards a contraction, another (`consistency`) pulls consecutive
passes together: if two of them end in the same states, so do all later ones.
Sources: random depth in Geiping et al. (arXiv 2502.05171); one-step gradients in Fung et al.
(arXiv 2103.12803); the Jacobian penalty in Bai et al. (arXiv 2106.14342), there on the whole
Jacobian, here on each token's own block.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import BatchStates, Key, PerSequence, Tokens
from nrgpt_jax.core.block import State
from nrgpt_jax.core.descent import RolloutOptions
from nrgpt_jax.models import LanguageModel, rollouts
from nrgpt_jax.models.decoding import decode_behind

DISTRIBUTIONS = ("fixed", "uniform", "log_uniform")
EACH = ("batch", "sequence")
# Folded into the key of a training step, which dropout also uses.
_OF_OTHERS, _OF_DEPTH, _OF_PENALTY, _OF_PROMPT = 0, 1, 2, 3
_OF_ROLLOUT = 3  # plus the index of the rollout, from 1


class Depth(NamedTuple):
    """The fields of `config.depth`, with each 0 that means a default resolved."""

    distribution: str
    min_steps: int
    max_steps: int
    sample_per: str
    curriculum_steps: int
    backprop_steps: int
    loss_steps: int
    refine_passes: int
    max_burn_in_passes: int
    train_on_decoded: bool
    consistency: float
    penalty: float
    penalty_bound: float


class Made(NamedTuple):
    """The states and the penalty that a training step computes its loss from."""

    states: list[BatchStates]  # at which the loss is evaluated
    penalty: Float[Array, "B N"] | None  # added to the loss of each token


def of_config(config: Mapping[str, Any]) -> Depth | None:
    """Return the depth settings; None if every rollout takes all steps, with a last-state loss."""
    fields, steps = config["depth"], config["model"]["num_steps"]
    fixed = fields["distribution"] == "fixed"
    min_steps = steps if fixed else fields["min_steps"] or 1
    max_steps = steps if fixed else fields["max_steps"] or 2 * steps
    steps = fields["backprop_steps"] or max_steps
    depth = Depth(
        **{
            **fields,
            "min_steps": min_steps,
            "max_steps": max_steps,
            "backprop_steps": min(steps, max_steps),
        }
    )
    plain = fixed and depth.backprop_steps == steps and depth.loss_steps == 1
    plain = plain and not (depth.penalty or depth.refine_passes or depth.train_on_decoded)
    return None if plain else depth


def sample_num_steps(
    depth: Depth, key: Key, rows: PerSequence, step: Int[Array, ""]
) -> Int[Array, ""] | Int[Array, "B"]:
    """Sample the number of recurrent steps: (), or (B,) for each row of a batch.

    The maximum grows over the first `curriculum_steps` training steps: linearly or, for the
    log-uniform distribution, geometrically.
    """
    grown = jnp.minimum(1.0, (step + 1) / max(depth.curriculum_steps, 1))
    by_factors = depth.distribution == "log_uniform"
    if by_factors:
        max_steps = jnp.round(depth.min_steps * (depth.max_steps / depth.min_steps) ** grown)
    else:
        max_steps = jnp.round(depth.min_steps + grown * (depth.max_steps - depth.min_steps))

    def one(key: Key) -> jax.Array:
        u = jax.random.uniform(key)
        if by_factors:
            sampled = depth.min_steps * jnp.exp(u * jnp.log((max_steps + 1) / depth.min_steps))
        else:
            sampled = depth.min_steps + u * (max_steps - depth.min_steps + 1)
        return jnp.minimum(sampled, max_steps).astype(jnp.int32)

    key = jax.random.fold_in(key, _OF_DEPTH)
    if depth.sample_per == "batch":
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
    """Run the rollouts of a training step, with a sampled number of recurrent steps.

    Args:
      params, model: the parameters, and the model from `create_model`.
      tokens: (B,N).
      rows: (B,) indices of the sequences in the whole batch.
      key: the key of the training step.
      depth: the depth settings.
      step: the number of completed training steps.
    """
    count = sample_num_steps(depth, key, rows, step)
    method = rollouts.partial_rollout

    def apply(model: LanguageModel, options: RolloutOptions, number: int = 0) -> Any:
        rngs = {"dropout": jax.random.fold_in(key, _OF_ROLLOUT + number) if number else key}
        variables = {"params": params}
        return model.apply(variables, tokens, options, True, rows, method=method, rngs=rngs)

    begin, constant = None, {"params": jax.lax.stop_gradient(params)}
    if depth.backprop_steps < depth.max_steps:
        before = jnp.maximum(count - depth.backprop_steps, 0)
        begin = cast(Any, model.apply(constant, tokens, before, method=rollouts.equal_steps))
        count -= before
    full = model.clone(num_steps=depth.backprop_steps)
    first = model.clone(num_steps=depth.backprop_steps - depth.loss_steps + 1)
    always = depth.min_steps == depth.max_steps  # then none is skipped
    num_skipped_steps = None if always else jnp.maximum(depth.backprop_steps - count, 0)
    refined = lambda context: RolloutOptions(None, num_skipped_steps, context)
    alone = lambda: apply(first, RolloutOptions(begin, num_skipped_steps))
    burn_in: Any = lambda context: full.apply(constant, tokens, refined(context), method=method)
    after, max_passes = lambda context: apply(first, refined(context)), depth.max_burn_in_passes
    ends = [_after_burn_in(max_passes, key, burn_in, after, alone) if max_passes else alone()]
    for number in range(1, depth.loss_steps):
        ends.append(apply(model.clone(num_steps=1), RolloutOptions(ends[-1]), number))
    last = depth.loss_steps - 1
    for number in range(depth.loss_steps, depth.loss_steps + depth.refine_passes):
        ends.append(apply(full, refined(ends[-1]), number))
    penalty = _penalty(params, model, tokens, ends[last:], rows, key, depth)
    of_decoded = lambda: [_decoded_suffix(params, model, tokens, ends[last], key)]
    suffixes = of_decoded() if depth.train_on_decoded else []
    return Made([end.x for end in ends] + suffixes, penalty)


def _decoded_suffix(params: Any, model: Any, tokens: Tokens, end: State, key: Key) -> BatchStates:
    """Return the final states of tokens decoded after a prompt of random length."""
    longest = max(1, tokens.shape[1] // 2)
    prompt = jax.random.randint(jax.random.fold_in(key, _OF_PROMPT), (), 1, longest + 1)
    return model.apply({"params": params}, tokens, end, prompt, method=decode_behind)


def _after_burn_in(
    max_passes: int,
    key: Key,
    burn_in: Callable[[State | None], State],
    after: Callable[[State], State],
    alone: Callable[[], State],
) -> State:
    """Apply `after` to the final state of k ~ U{0..max_passes} passes, or `alone` if k = 0.

    The context of each pass is the final states of the previous pass.
    """
    count = jax.random.randint(jax.random.fold_in(key, _OF_OTHERS), (), 0, max_passes + 1)
    ends = lambda: jax.lax.fori_loop(1, count, lambda _, c: burn_in(c), burn_in(None))
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
    """Compute the penalty of each token from `ends`, the final states of the passes."""
    parts = []
    if depth.penalty:
        gain = _gain(params, model, tokens, ends[0], rows, jax.random.fold_in(key, _OF_PENALTY))
        parts.append(depth.penalty * jnp.maximum(gain - depth.penalty_bound, 0.0) ** 2)
    if depth.consistency:
        apart = lambda *xs: model.apply({"params": params}, *xs, method=rollouts.squared_distance)
        distances = [apart(before.x, after.x) for before, after in itertools.pairwise(ends)]
        parts.append(depth.consistency * jnp.mean(jnp.stack(cast(Any, distances)), axis=0))
    return sum(parts[1:], parts[0]) if parts else None


def _gain(
    params: Any, model: LanguageModel, tokens: Tokens, end: State, rows: PerSequence, key: Key
) -> Float[Array, "B N"]:
    """Compute ||J v|| / ||v|| of one more step, with J each token's own block and v random."""
    of_row = lambda row: jax.random.normal(jax.random.fold_in(key, row), end.x.shape[1:])
    v, plain = jax.vmap(of_row)(jnp.asarray(rows)), model.with_implementation("autodiff")
    gain = plain.apply({"params": params}, tokens, end, v, method=rollouts.step_gain)
    return cast(jax.Array, gain)
