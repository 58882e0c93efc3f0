"""Scores of given text: likelihoods for evaluation harnesses, energies, the error of a cache."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nrgpt_jax.array_types import Variables
from nrgpt_jax.core.descent import Decoding
from nrgpt_jax.errors import UserError

SMALLEST_BUCKET = 16


class Likelihood(NamedTuple):
    """Of a continuation, given its context."""

    log_likelihood: float  # nats, the sum over its tokens
    is_greedy: bool  # every token is the most probable one


def log_likelihood(
    model: nn.Module,
    variables: Variables,
    contexts: Sequence[np.ndarray],
    continuations: Sequence[np.ndarray],
    *,
    num_symbols: int | None = None,
    batch_size: int = 32,
) -> list[Likelihood]:
    """log p(continuation | context) of every pair.

    A pair longer than the context length loses its oldest tokens.

    Args:
      model, variables: as of `create_model`.
      contexts: token arrays, at least one token each.
      continuations: token arrays, at least one token each.
      num_symbols: tokens from here on are padding of the vocabulary, with no probability.
      batch_size: pairs at a time.

    Raises:
      UserError: a context or a continuation is empty, or a continuation alone is longer than
        the context length.
    """
    pairs = [
        _pair(*pair, model.context_length) for pair in zip(contexts, continuations, strict=True)
    ]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))  # little padding
    found: dict[int, Likelihood] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = _bucket(len(pairs[chosen[0]][0]) - 1, model.context_length)
        filled = chosen + chosen[:1] * (batch_size - len(chosen))  # one compiled shape
        tokens = np.stack([np.pad(pairs[i][0], (0, width + 1 - len(pairs[i][0]))) for i in filled])
        log_probs, best = map(np.asarray, _score(model, num_symbols, variables, tokens))
        for row, i in enumerate(chosen):
            text, new = pairs[i]
            part = slice(len(text) - 1 - new, len(text) - 1)
            total = float(np.sum(log_probs[row, part], dtype=np.float64))
            found[i] = Likelihood(total, bool(best[row, part].all()))
    return [found[i] for i in range(len(pairs))]


def _pair(context, continuation, length: int) -> tuple[np.ndarray, int]:
    """The end of both together, and the length of the continuation."""
    context, continuation = (np.asarray(a, np.int32).reshape(-1) for a in (context, continuation))
    if not len(context) or not len(continuation):
        raise UserError("a context or a continuation is empty; each needs at least one token")
    if len(continuation) > length:
        raise UserError(
            f"a continuation of {len(continuation)} tokens does not fit the context length {length}"
        )
    return np.concatenate([context, continuation])[-(length + 1) :], len(continuation)


def _bucket(count: int, most: int) -> int:
    return min(max(SMALLEST_BUCKET, 1 << (count - 1).bit_length()), most)


@partial(jax.jit, static_argnums=(0, 1))
def _score(model, num_symbols, variables, tokens):
    """Of every token but the first: its log-probability, and whether it is the most probable."""
    logits = model.apply(variables, tokens[:, :-1])[..., :num_symbols]
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen, jnp.argmax(logits, axis=-1) == tokens[:, 1:]


def token_energies(model: nn.Module, variables: Variables, tokens: np.ndarray) -> np.ndarray:
    """The total energy of every token (n,) after the last step.

    Texts longer than the context length are read in windows that overlap by half; a token's
    energy is from the window that holds most of its context.
    """
    length, n = model.context_length, len(tokens)
    width = _bucket(n, length)
    energies, start = np.empty(0, np.float32), 0
    while len(energies) < n:
        part = np.pad(tokens[start : start + width], (0, max(0, start + width - n)))
        new = np.asarray(_last_energies(model, variables, part[None]))
        energies = np.concatenate([energies, new[len(energies) - start : n - start]])
        start += max(1, length // 2)
    return energies


@partial(jax.jit, static_argnums=0)
def _last_energies(model, variables, tokens):
    return model.apply(variables, tokens, method="energies")["total"][-1, 0]


class CacheError(NamedTuple):
    """How far logits of cached decoding are from exact ones, over the decoded tokens."""

    largest: float  # absolute difference of a logit
    divergence: float  # mean KL divergence from the exact distribution, nats
    agreement: float  # share of tokens with the same most probable next token


def cache_error(
    model: nn.Module, variables: Variables, tokens: np.ndarray, prompt: int, decoding: Decoding
) -> CacheError:
    """Reads a text by cached decoding and compares every prediction with the exact one.

    Args:
      model, variables: as of `create_model`.
      tokens: (n,), at most the context length; of longer ones the end is read.
      prompt: so many tokens, at least 1, are read at once, the others one by one.
      decoding: the cache in question.
    """
    gone = max(0, len(tokens) - model.context_length)
    text, prompt = jnp.asarray(tokens[gone:], jnp.int32), max(1, prompt - gone)
    return CacheError(*map(float, _cache_error(model, prompt, decoding, variables, text)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _cache_error(model, prompt, decoding, variables, tokens):
    exact = model.apply(variables, tokens[None])[0]
    call = partial(model.apply, variables, decoding=decoding)
    cache = model.apply(variables, 1, len(tokens), decoding.cache, method="empty_cache")
    lengths = jnp.array([prompt])
    first, cache, _ = call(tokens[None, :prompt], lengths, cache, method="prefill")

    def one(cache, position):
        logits, cache, _ = call(tokens[position][None], position[None], cache, method="decode")
        return cache, logits[0]

    _, logits = jax.lax.scan(one, cache, jnp.arange(prompt, len(tokens)))
    logits, exact = jnp.concatenate([first, logits]), exact[prompt - 1 :]
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(logits)
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    divergence = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    return jnp.max(jnp.abs(logits - exact)), divergence, jnp.mean(same.astype(jnp.float32))
