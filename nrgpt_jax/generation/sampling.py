"""How the next token is drawn from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import Key
from nrgpt_jax.errors import require

Logits = Float[Array, "B V"]
_MOST = 1e6
_LEAST = float(np.finfo(np.float32).tiny)  # what is smaller is 0 where it is computed


class Sampling(NamedTuple):
    """Settings of the draw; the default takes the most probable token.

    The repetition penalty acts first, then the temperature, top-k, top-p and min-p, each on what
    the ones before have left.
    """

    temperature: float = 0.0  # 0 (in float32): greedy
    top_k: int = 0  # draw from the k most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the most probable tokens that hold this share
    min_p: float = 0.0  # draw from tokens at least this times as probable as the first
    repetition_penalty: float = 1.0  # logits of tokens in the context: over it, or times if < 0


class Switches(NamedTuple):
    """What of a `Sampling` is in effect: known when a draw is compiled, unlike the numbers."""

    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    repetition_penalty: bool


def switches(sampling: Sampling) -> Switches:
    """The switches of settings that are numbers."""
    return Switches(
        greedy=sampling.temperature < _LEAST,
        top_k=sampling.top_k,
        top_p=sampling.top_p < 1.0,
        min_p=sampling.min_p >= _LEAST,
        repetition_penalty=sampling.repetition_penalty != 1.0,
    )


def check_sampling(sampling: Sampling) -> None:
    """Raises UserError naming the setting that is out of range."""
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
    """The logits (...,num_symbols) of tokens that stand for something; None: of all (...,V).

    A vocabulary may be padded, to a size that devices divide: whatever draws or ranks tokens
    leaves that padding out by this function.
    """
    return logits[..., :num_symbols]


def penalize(logits: Logits, present: Bool[Array, "B V"], penalty: float) -> Logits:
    """Makes tokens that were seen less probable: CTRL's penalty (arXiv 1909.05858, section 4.1)."""
    return jnp.where(present, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Logits, sampling: Sampling, on: Switches) -> Logits:
    """Logits over a positive temperature; -inf for tokens outside top-k, top-p or min-p.

    They are relative to the largest, so that none is too large for any temperature.
    """
    first = jnp.max(logits, axis=-1, keepdims=True)
    relative = jnp.where(logits == first, 0.0, logits - first)  # 0 also where it is infinite
    logits = relative / sampling.temperature
    if 0 < on.top_k < logits.shape[-1]:
        logits = jnp.where(_ranks(logits) < on.top_k, logits, -jnp.inf)
    if on.top_p:
        share = jax.nn.softmax(jnp.sort(logits, axis=-1, descending=True), axis=-1)
        inside = jnp.cumsum(share, axis=-1) - share < sampling.top_p
        count = jnp.maximum(1, jnp.sum(inside, axis=-1, keepdims=True))  # the first is always in
        logits = jnp.where(_ranks(logits) < count, logits, -jnp.inf)
    if on.min_p:
        logits = jnp.where(logits < jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def _ranks(logits: Logits) -> Int[Array, "B V"]:
    """The place of each token in the order of its logits, 0 the highest; of equals the first."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    return jnp.argsort(order, axis=-1)


def next_token(
    key: Key,
    logits: Logits,
    sampling: Sampling,
    on: Switches,
    present: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """Draws one token a row.

    Args:
      key: of this draw.
      logits: (B,V).
      sampling: numbers, or arrays where the draw is compiled.
      on: `switches(sampling)`.
      present: the tokens that a repetition penalty is for.
    """
    if on.repetition_penalty and present is not None:
        logits = penalize(logits, present, sampling.repetition_penalty)
    if on.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling, on)).astype(jnp.int32)
