"""Next-token cross-entropy."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import Logits

Targets = Int[Array, "B N"]


def cross_entropy(logits: Logits, targets: Targets) -> Float[Array, "B N"]:
    """-log p(target) in nats, a token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def next_token_accuracy(logits: Logits, targets: Targets) -> Float[Array, "B N"]:
    """1 where the most probable token is the target, else 0."""
    return (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)
