"""Scores of text: likelihoods for evaluation harnesses, energies, errors of a KV cache."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax.array_types import Variables
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.generation.decode import as_tokens, bucket
from nrgpt_jax.generation.sampling import of_symbols
from nrgpt_jax.models import LanguageModel
from nrgpt_jax.models.decoding import Decoding, decode_scan, forward_cached
from nrgpt_jax.models.readout import map_logits


class Likelihood(NamedTuple):
    """The likelihood of a continuation, given its context."""

    log_likelihood: float  # nats, the sum over its tokens
    is_greedy: bool  # every token is the most probable one


def log_likelihood(
    model: LanguageModel,
    variables: Variables,
    contexts: Sequence[np.ndarray],
    continuations: Sequence[np.ndarray],
    *,
    num_symbols: int | None = None,
    batch_size: int = 32,
) -> list[Likelihood]:
    """Compute log p(continuation | context) of every pair.

    A pair longer than the context length is truncated: its oldest tokens are dropped.

    Args:
      model, variables: model from `create_model`, and its parameters.
      contexts: token arrays, at least one token each.
      continuations: token arrays, at least one token each.
      num_symbols: tokens from here on are vocabulary padding, with probability 0.
      batch_size: number of pairs per batch.

    Raises:
      UserError: a context or a continuation is empty, or a continuation alone is longer than
        the context length.
    """
    pairs = [_pair(*pair, model) for pair in zip(contexts, continuations, strict=True)]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))  # little padding
    result: dict[int, Likelihood] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = bucket(len(pairs[chosen[0]][0]) - 1, model.context_length)
        filled = chosen + chosen[:1] * (batch_size - len(chosen))  # one compiled shape
        tokens = np.stack([np.pad(pairs[i][0], (0, width + 1 - len(pairs[i][0]))) for i in filled])
        log_probs, best = map(np.asarray, _score(model, num_symbols, variables, tokens))
        for row, i in enumerate(chosen):
            text, new = pairs[i]
            part = slice(len(text) - 1 - new, len(text) - 1)
            total = float(np.sum(log_probs[row, part], dtype=np.float64))
            result[i] = Likelihood(total, bool(best[row, part].all()))
    return [result[i] for i in range(len(pairs))]


def _pair(context, continuation, model: LanguageModel) -> tuple[np.ndarray, int]:
    """Return the concatenated pair, truncated on the left, and the length of the continuation."""
    context, continuation = (as_tokens(a, model.vocab_size) for a in (context, continuation))
    length = model.context_length
    if not len(context) or not len(continuation):
        raise UserError("a context or a continuation is empty; each needs at least one token")
    if len(continuation) > length:
        raise UserError(
            f"a continuation of {len(continuation)} tokens does not fit the context length {length}"
        )
    return np.concatenate([context, continuation])[-(length + 1) :], len(continuation)


@partial(jax.jit, static_argnums=(0, 1))
def _score(model, num_symbols, variables, tokens):
    """Return the log-probability of every token but the first, and whether it is the greedy one."""

    def scores(logits, targets):
        logits = of_symbols(logits, num_symbols)
        log_probs = jnp.where(targets < logits.shape[-1], _log_probs(logits, targets), -jnp.inf)
        return log_probs, jnp.argmax(logits, axis=-1) == targets

    x = model.apply(variables, tokens[:, :-1], method=model.forward)[0].x
    return map_logits(model, variables["params"], x, scores, tokens[:, 1:])


def token_energies(model: LanguageModel, variables: Variables, tokens: np.ndarray) -> np.ndarray:
    """Compute the total energy of every token (n,) after the last step.

    Texts longer than the context length are split into windows that overlap by half; a token's
    energy is from the window with most of its context.
    """
    length, n = model.context_length, len(tokens)
    width = bucket(n, length)
    energies, start = np.empty(0, np.float32), 0
    while len(energies) < n:
        part = np.pad(tokens[start : start + width], (0, max(0, start + width - n)))
        new = np.asarray(_last_energies(model, variables, part[None]))
        energies = np.concatenate([energies, new[len(energies) - start : n - start]])
        start += max(1, length // 2)
    return energies


@partial(jax.jit, static_argnums=0)
def _last_energies(model, variables, tokens):
    return model.apply(variables, tokens, method=model.energies)["total"][-1, 0]


class Read(NamedTuple):
    """Log-probabilities and steps of texts that are decoded token by token."""

    log_probs: np.ndarray  # (B,N-1) of the next token, nats
    steps: np.ndarray  # (B,N-1) descent steps of the token


def read_decoded(
    model: LanguageModel, variables: Variables, tokens: np.ndarray, decoding: Decoding
) -> Read:
    """Decode every token of texts as in generation; return log-probabilities and descent steps.

    Args:
      model, variables: model from `create_model`, and its parameters.
      tokens: (B,N), N at most one more than the context length.
      decoding: kind of cache and stopping criterion.

    Raises:
      UserError: the texts are longer, or have less than two tokens.
    """
    allowed = f"between 2 and {model.context_length + 1}, one more than the context length"
    length = tokens.shape[1]
    require(2 <= length <= model.context_length + 1, "length of a text", length, allowed)
    return Read(*map(np.asarray, _read(model, decoding, variables, jnp.asarray(tokens))))


@partial(jax.jit, static_argnums=(0, 1))
def _read(model, decoding, variables, tokens):
    call = partial(model.apply, variables)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    cache = call(*inputs.shape, decoding.cache, method=model.empty_cache)
    x = call(inputs, method=model.embed)
    x, steps = call(x, cache, decoding, method=decode_scan)
    log_probs = map_logits(model, variables["params"], x, _log_probs, following)
    return log_probs, steps


def _log_probs(logits, targets):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return chosen[..., 0]


class CacheError(NamedTuple):
    """The errors of the logits of cached decoding over the decoded tokens."""

    largest: float  # absolute difference of a logit
    divergence: float  # mean KL divergence from the exact distribution, nats
    agreement: float  # share of tokens with the same most probable next token


def cache_error(
    model: LanguageModel,
    variables: Variables,
    tokens: np.ndarray,
    prompt: int,
    decoding: Decoding,
    num_symbols: int | None = None,
) -> CacheError:
    """Compare every prediction of cached decoding of a text with the exact one.

    Args:
      model, variables: model from `create_model`, and its parameters.
      tokens: (n,); only the last `context_length` tokens are used.
      prompt: number of prefilled tokens, at least 1; the others are decoded one by one.
      decoding: cache under test; the exact reference uses the same stopping criterion.
      num_symbols: tokens from here on are vocabulary padding, and not compared.
    """
    gone = max(0, len(tokens) - model.context_length)
    text = as_tokens(tokens[gone:], model.vocab_size)
    padded = np.pad(text, (0, bucket(len(text), model.context_length) - len(text)))
    ends = np.int32(max(1, prompt - gone)), np.int32(len(text))
    result = _cache_error(model, decoding, num_symbols, variables, padded[None], *ends)
    return CacheError(*map(float, result))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _cache_error(model, decoding, num_symbols, variables, tokens, prompt, length):
    call = partial(model.apply, variables)
    slots = tokens.shape[1]
    empty = lambda kind: call(1, slots, kind, method=model.empty_cache)
    x = call(tokens, method=model.embed)
    active = jnp.arange(slots)[None] < length
    exactly = decoding._replace(cache="exact")
    x = call(x, empty("exact"), None, exactly, active, method=forward_cached)[0]
    raw = of_symbols(call(x, method=model.readout)[0], num_symbols)
    exact = jax.nn.log_softmax(raw)

    def compare(result, logits, position):
        largest, divergence, same = result
        logits = of_symbols(logits, num_symbols)
        p, q = exact[position], jax.nn.log_softmax(logits)
        return (
            jnp.maximum(largest, jnp.max(jnp.abs(logits - raw[position]))),
            divergence + jnp.sum(jnp.exp(p) * (p - q)),
            same + (jnp.argmax(p) == jnp.argmax(q)).astype(jnp.float32),
        )

    def one(position, carry):
        result, cache = carry
        logits, cache, _ = call(
            tokens[:, position], position[None], cache, decoding, method=model.decode
        )
        return compare(result, logits[0], position), cache

    start = call(tokens, prompt[None], empty(decoding.cache), decoding, method=model.prefill)
    result = compare((0.0, 0.0, 0.0), start[0][0], prompt - 1)
    (largest, divergence, same), _ = jax.lax.fori_loop(prompt, length, one, (result, start[1]))
    count = (length - prompt + 1).astype(jnp.float32)
    return largest, divergence / count, same / count
