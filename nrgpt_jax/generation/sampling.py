"""Sampling of the next token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import Key
from nrgpt_jax.errors import require

Logits = Float[Array, "B V"]
_MOST = 1e6
_LEAST = float(np.finfo(np.float32).tiny)  # smaller numbers are flushed to 0


class Sampling(NamedTuple):
    """Sampling settings; greedy by default.

    The repetition penalty acts first, then temperature, top-k, top-p and min-p, each on the result
    of the previous ones.
    """

    temperature: float = 0.0  # 0 (in float32): greedy
    top_k: int = 0  # sample from the k most probable tokens; 0: from all
    top_p: float = 1.0  # sample from the most probable tokens with this total probability
    min_p: float = 0.0  # least probability, relative to the most probable token
    repetition_penalty: float = 1.0  # divides logits > 0 of past tokens, multiplies others


class Switches(NamedTuple):
    """The settings of a `Sampling` that are active: static when compiled, unlike their values."""

    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    repetition_penalty: bool


def switches(sampling: Sampling) -> Switches:
    """Return the switches of sampling settings with concrete numbers."""
    return Switches(
        greedy=sampling.temperature < _LEAST,
        top_k=sampling.top_k,
        top_p=sampling.top_p < 1.0,
        min_p=sampling.min_p >= _LEAST,
        repetition_penalty=sampling.repetition_penalty != 1.0,
    )


def check_sampling(sampling: Sampling) -> None:
    """Raise UserError if a setting is out of range."""
    for name, good, allowed in (
        ("temperature", 0 <= sampling.temperature <= _MOST, f"0 (greedy) to {_MOST:g}"),
        (
            "top_k",
            0 <= sampling.top_k <= _MOST and int(sampling.top_k) == sampling.top_k,
            f"a whole number from 0 (all tokens) to {_MOST:,.0f}",
        ),
        ("top_p", 0 < sampling.top_p <= 1, "above 0, at most 1"),
        ("min_p", 0 <= sampling.min_p <= 1, "between 0 and 1"),
        (
            "repetition_penalty",
            1 / _MOST <= sampling.repetition_penalty <= _MOST,
            f"{1 / _MOST:g} to {_MOST:g}; 1 changes nothing",
        ),
    ):
        require(good, name, getattr(sampling, name), allowed)


def of_symbols(logits: jax.Array, num_symbols: int | None) -> jax.Array:
    """Return the logits (...,num_symbols) without vocabulary padding; None: all (...,V).

    A vocabulary may be padded to a multiple of the number of devices; every function that samples
    or ranks tokens removes the padding with this one.
    """
    return logits[..., :num_symbols]


def penalize(logits: Logits, present: Bool[Array, "B V"], penalty: float) -> Logits:
    """Penalize the logits of past tokens as in CTRL (arXiv 1909.05858, section 4.1)."""
    return jnp.where(present, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Logits, sampling: Sampling, on: Switches) -> Logits:
    """Divide logits by a positive temperature; -inf for tokens outside top-k, top-p or min-p.

    The result is relative to the largest logit, so that no temperature makes it overflow.
    """
    first = jnp.max(logits, axis=-1, keepdims=True)
    relative = jnp.where(logits == first, 0.0, logits - first)  # 0 also if the largest is infinite
    logits = relative / sampling.temperature
    if 0 < on.top_k < logits.shape[-1]:
        logits = jnp.where(_ranks(logits) < on.top_k, logits, -jnp.inf)
    if on.top_p:
        share = jax.nn.softmax(jnp.sort(logits, axis=-1, descending=True), axis=-1)
        inside = jnp.cumsum(share, axis=-1) - share < sampling.top_p
        count = jnp.maximum(1, jnp.sum(inside, axis=-1, keepdims=True))  # at least the first
        logits = jnp.where(_ranks(logits) < count, logits, -jnp.inf)
    if on.min_p:
        logits = jnp.where(logits < jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def _ranks(logits: Logits) -> Int[Array, "B V"]:
    """Return the rank of each token by logit, 0 the highest; ties are in order of the tokens."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    return jnp.argsort(order, axis=-1)


def next_token(
    key: Key,
    logits: Logits,
    sampling: Sampling,
    on: Switches,
    present: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """Sample one token per row.

    Args:
      key: random key of this token.
      logits: (B,V).
      sampling: sampling settings: numbers, or arrays under `jit`.
      on: `switches(sampling)`.
      present: tokens that the repetition penalty applies to.
    """
    if on.repetition_penalty and present is not None:
        logits = penalize(logits, present, sampling.repetition_penalty)
    if on.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling, on)).astype(jnp.int32)
