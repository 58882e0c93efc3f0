"""How the next token is drawn from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import Key
from nrgpt_jax.errors import UserError

Logits = Float[Array, "B V"]


class Sampling(NamedTuple):
    """Settings of the draw; the default takes the most probable token.

    They act in the order of the fields, each on what the ones before have left.
    """

    repetition_penalty: float = 1.0  # logits of tokens in the context: over it, or times if < 0
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # draw from the k most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the most probable tokens that hold this share
    min_p: float = 0.0  # draw from tokens at least this times as probable as the first


def check_sampling(sampling: Sampling) -> None:
    """Raises UserError naming the setting that is out of range."""
    for name, good, allowed in (
        ("repetition_penalty", sampling.repetition_penalty > 0, "above 0; 1 changes nothing"),
        ("temperature", sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0, at most 1"),
        ("min_p", 0 <= sampling.min_p <= 1, "between 0 and 1"),
    ):
        if not good:
            value = getattr(sampling, name)
            raise UserError(f"{name}={value} is out of range: {allowed}")


def penalize(logits: Logits, seen: Bool[Array, "B V"], penalty: float) -> Logits:
    """Makes tokens that were seen less probable: CTRL's penalty (arXiv 1909.05858, section 4.1)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Logits, sampling: Sampling) -> Logits:
    """Logits over a positive temperature; -inf for tokens outside top-k, top-p or min-p."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ranked, axis=-1)
        inside = jnp.cumsum(share, axis=-1) - share < sampling.top_p  # the first is always in
        least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p > 0.0:
        first = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < first + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def next_token(
    key: Key, logits: Logits, sampling: Sampling, seen: Bool[Array, "B V"] | None = None
) -> Int[Array, "B"]:
    """Draws one token a row; `seen` marks the tokens that a repetition penalty is for."""
    if seen is not None and sampling.repetition_penalty != 1.0:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling)).astype(jnp.int32)
