"""Generation by recomputing the whole context for every token."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import Key, Variables


class Sampling(NamedTuple):
    """How the next token is drawn; the default takes the most probable one."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # draw from the k most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the most probable tokens that hold this share


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature; -inf for tokens outside top-k or top-p."""
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
    return logits


def next_token(key: Key, logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, "B"]:
    """Draws one token a row."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling)).astype(jnp.int32)


def generate(
    model: nn.Module,
    variables: Variables,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    seed: int = 0,
    end_token: int | None = None,
    num_symbols: int | None = None,
) -> list[np.ndarray]:
    """Continues prompts of any lengths, together.

    Once a sequence fills the context length, its oldest tokens leave the context.

    Args:
      model: a module of `create_model`.
      variables: its parameters.
      prompts: token arrays (length,), at least one token each; of one longer than the context
        only the end is read.
      max_new_tokens: how many tokens to add at most.
      sampling: how to draw; greedy by default.
      seed: of the draws.
      end_token: a sequence ends after this token; None never ends.
      num_symbols: tokens from here on are padding of the vocabulary and are never drawn.

    Returns:
      The new tokens of each prompt, (new,) int32, without the end token.
    """
    length = model.context_length
    prompts = [np.asarray(prompt, dtype=np.int32)[-length:] for prompt in prompts]
    if min(map(len, prompts), default=0) == 0:
        raise ValueError("a prompt needs at least one token")
    window = np.stack([np.pad(prompt, (0, length - len(prompt))) for prompt in prompts])
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    end = -1 if end_token is None else end_token
    key = jax.random.key(seed)
    static = model, max_new_tokens, sampling, num_symbols or model.vocab_size
    out, counts = _generate(*static, variables, window, lengths, key, end)
    return [row[:n] for row, n in zip(np.asarray(out), np.asarray(counts), strict=True)]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model, max_new_tokens, sampling, num_symbols, variables, window_BxN, length_B, key, end
):
    rows = jnp.arange(window_BxN.shape[0])

    def unfinished(carry):
        i, *_, done_B, _ = carry
        return (i < max_new_tokens) & ~jnp.all(done_B)

    def add_token(carry):
        i, window_BxN, length_B, done_B, out = carry
        logits = model.apply(variables, window_BxN)[rows, length_B - 1, :num_symbols]
        token_B = next_token(jax.random.fold_in(key, i), logits, sampling)
        done_B = done_B | (token_B == end)
        out = out.at[:, i].set(jnp.where(done_B, -1, token_B))
        window_BxN, length_B = _append(window_BxN, length_B, token_B)
        return i + 1, window_BxN, length_B, done_B, out

    done_B = jnp.zeros(rows.shape, bool)
    out = jnp.full((rows.shape[0], max_new_tokens), -1, jnp.int32)
    carry = jax.lax.while_loop(unfinished, add_token, (0, window_BxN, length_B, done_B, out))
    return carry[-1], jnp.sum(carry[-1] >= 0, axis=1)


def _append(window_BxN, length_B, token_B):
    """Puts a token behind each row; a full row loses its first."""
    rows = jnp.arange(window_BxN.shape[0])
    full_B = length_B == window_BxN.shape[1]
    window_BxN = jnp.where(full_B[:, None], jnp.roll(window_BxN, -1, axis=1), window_BxN)
    place_B = jnp.where(full_B, length_B - 1, length_B)
    return window_BxN.at[rows, place_B].set(token_B), place_B + 1
