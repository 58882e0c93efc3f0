"""Next-token cross-entropy."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import Batch, Key, Logits, Tokens
from nrgpt_jax.core import metrics
from nrgpt_jax.generation.sampling import of_symbols
from nrgpt_jax.models import LanguageModel
from nrgpt_jax.models.evaluators import chosen
from nrgpt_jax.models.readout import map_logits, weighted_sum
from nrgpt_jax.training.depths import Depth, make_states

Targets = Int[Array, "B N"]


def cross_entropy(logits: Logits, targets: Targets) -> Float[Array, "B N"]:
    """Compute -log p(target) in nats per token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def next_token_accuracy(
    logits: Logits, targets: Targets, num_symbols: int | None = None
) -> Float[Array, "B N"]:
    """Return 1 where the most probable of the tokens below `num_symbols` is the target, else 0."""
    best = jnp.argmax(of_symbols(logits, num_symbols), axis=-1)
    return (best == targets).astype(logits.dtype)


def loss_fn(
    model: LanguageModel,
    params: Any,
    batch: Batch | Tokens,
    key: Key | None = None,
    step_metrics: Sequence[str] = (),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute the mean next-token cross-entropy of a batch in nats, and `aux`: metrics.

    Args:
      model, params: the model from `create_model`, and its parameters.
      batch: tokens (B,N+1), of which each row predicts its last N; or a `Batch`.
      key: the dropout key; None: no dropout.
      step_metrics: names in `core.metrics.METRICS`, evaluated at every recurrent step.

    Returns:
      The loss, and `num_tokens` with the metrics by name and step, `energy/0` to `energy/{T-1}`.
    """
    if not isinstance(batch, Batch):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        batch = Batch(inputs, targets, jnp.ones(targets.shape, jnp.float32))
    count = jnp.sum(jnp.asarray(batch.weights))
    rows, scale = jnp.arange(len(batch.inputs)), 1.0 / jnp.maximum(count, 1.0)
    options = rows, key, scale, 0, None, step_metrics
    loss, aux = summed_loss(params, model, batch, *options)
    return loss, {"num_tokens": count, **aux}


def summed_loss(
    params: Any,
    model: LanguageModel,
    batch: Batch,
    rows: jax.Array,
    key: Key | None,
    scale: Any,
    step: Any = 0,
    depth: Depth | None = None,
    step_metrics: Sequence[str] = (),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute `scale` times the weighted sum of losses of a batch, and `aux`: metrics likewise.

    Args:
      params, model: the parameters, and the model from `create_model`.
      batch: b sequences.
      rows: (b,) indices of the sequences in the whole batch, for dropout and random depth.
      key: the key of dropout and random depth; None: no dropout.
      scale: ().
      step: () number of completed training steps.
      depth: the depth settings; None: `model.num_steps` recurrent steps.
      step_metrics: names in `core.metrics.METRICS`, at every recurrent step; ignored with `depth`.

    Returns:
      The loss, and metrics by name and step, `energy/0` to `energy/{T-1}`.
    """
    weights, targets = jnp.asarray(batch.weights), jnp.asarray(batch.targets)
    read = partial(weighted_sum, model, params)
    if depth is not None:
        assert key is not None
        drawn = make_states(params, model, batch.inputs, rows, key, depth, jnp.asarray(step))
        of_states = [read(x, weights, cross_entropy, targets) for x in drawn.states]
        loss = sum(of_states, jnp.zeros(())) / len(drawn.states)
        if drawn.penalty is not None:
            loss += jnp.sum(weights * drawn.penalty)
        return scale * loss, {}
    variables, rngs, record = {"params": params}, {} if key is None else {"dropout": key}, None
    if step_metrics:
        record = partial(metrics.record, tuple(step_metrics))
    tokens, forward = batch.inputs, model.forward
    state, records = model.apply(
        variables, tokens, key is not None, rows, record=record, method=forward, rngs=rngs
    )
    aux = {
        f"{name}/{t}": scale * jnp.sum(weights * value)
        for name, values in (records or {}).items()
        for t, value in enumerate(values)
    }
    return scale * read(state.x, weights, cross_entropy, targets), aux


def batch_sums(
    params: Any,
    model: LanguageModel,
    batch: Batch,
    num_symbols: int | None = None,
    evaluators: Sequence[str] = (),
) -> dict[str, Float[Array, ""]]:
    """Compute weighted sums of `loss`, `hits` and evaluators over a batch, and of the `weights`.

    There is no dropout. Tokens from `num_symbols` on are padding of the vocabulary: never a hit.
    """
    state, _ = model.apply({"params": params}, batch.inputs, method=model.forward)

    def scores(logits: Logits, targets: Targets) -> dict[str, Array]:
        return {
            "loss": cross_entropy(logits, targets),
            "hits": next_token_accuracy(logits, targets, num_symbols),
        }

    scored = map_logits(model, params, state.x, scores, jnp.asarray(batch.targets))
    for name, function in chosen(evaluators, "batch").items():
        scored[name] = function(model, params, batch)
    sums = {name: jnp.sum(values * batch.weights) for name, values in scored.items()}
    return {**sums, "weights": jnp.sum(jnp.asarray(batch.weights))}
