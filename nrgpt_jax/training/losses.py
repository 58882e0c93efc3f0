"""Next-token cross-entropy."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import Logits
from nrgpt_jax.models import LanguageModel
from nrgpt_jax.models.readout import map_logits, of_symbols, weighted_sum
from nrgpt_jax.training.depths import Depth, make_states

if TYPE_CHECKING:  # what reads data is heavy to import
    from nrgpt_jax.datasets.pipeline import Batch

Targets = Int[Array, "B N"]


def cross_entropy(logits: Logits, targets: Targets) -> Float[Array, "B N"]:
    """-log p(target) in nats, a token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def next_token_accuracy(
    logits: Logits, targets: Targets, num_symbols: int | None = None
) -> Float[Array, "B N"]:
    """1 where the most probable of the tokens below `num_symbols` is the target, else 0."""
    best = jnp.argmax(of_symbols(logits, num_symbols), axis=-1)
    return (best == targets).astype(logits.dtype)


def summed_loss(
    params: Any,
    model: LanguageModel,
    batch: "Batch",
    rows: jax.Array,
    key: jax.Array,
    scale: Any,
    step: Any = 0,
    depth: Depth | None = None,
) -> Float[Array, ""]:
    """`scale` times the weighted sum of the losses of a batch, as it is trained on.

    Args:
      params, model: as of `create_model`.
      batch: of b sequences.
      rows: (b,) their numbers in the whole batch, for dropout.
      key: of dropout.
      scale: ().
      step: () training steps that were made.
      depth: how many recurrent steps are made; None: `model.num_steps`.
    """
    weights, targets = jnp.asarray(batch.weights), jnp.asarray(batch.targets)
    at = lambda x: weighted_sum(model, params, x, weights, cross_entropy, targets)
    if depth is not None:
        made = make_states(params, model, batch.inputs, rows, key, depth, jnp.asarray(step))
        loss = sum(map(at, made.states), jnp.zeros(())) / len(made.states)
        if made.penalty is not None:
            loss += jnp.sum(weights * made.penalty)
        return scale * loss
    rngs = {"dropout": key}
    variables, forward = {"params": params}, model.forward
    state, _ = model.apply(variables, batch.inputs, True, rows, method=forward, rngs=rngs)
    return scale * at(state.x)


def batch_sums(
    params: Any, model: LanguageModel, batch: "Batch", num_symbols: int | None = None
) -> dict[str, Float[Array, ""]]:
    """Weighted sums of `loss` and `hits` over a batch, and of the `weights`; without dropout.

    Tokens from `num_symbols` on are padding of the vocabulary: never a hit.
    """
    state, _ = model.apply({"params": params}, batch.inputs, method=model.forward)

    def scores(logits: Logits, targets: Targets) -> dict[str, Array]:
        return {
            "loss": cross_entropy(logits, targets),
            "hits": next_token_accuracy(logits, targets, num_symbols),
        }

    found = map_logits(model, params, state.x, scores, jnp.asarray(batch.targets))
    sums = {name: jnp.sum(values * batch.weights) for name, values in found.items()}
    return {**sums, "weights": jnp.sum(jnp.asarray(batch.weights))}
