"""The compiled generation loop: prefill of the prompts, then decoding token by token.

A `Window` holds the tokens of B sequences and their KV cache. Its arrays have a fixed number of
slots, so calls of the same bucket do not recompile.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from nrgpt_jax.array_types import Key, Variables
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.sampling import Sampling, Switches, next_token, of_symbols
from nrgpt_jax.models import LanguageModel
from nrgpt_jax.models.decoding import Decoding

SMALLEST_BUCKET = 16


def bucket(count: int, limit: int) -> int:
    """Round up to a power of two, at most `limit`, so that few shapes are compiled."""
    return min(max(SMALLEST_BUCKET, 1 << (count - 1).bit_length()), limit)


def as_tokens(tokens: ArrayLike, vocab_size: int) -> np.ndarray:
    """Return tokens (n,) int32. Raises UserError if one is not in the vocabulary."""
    array = np.asarray(tokens, dtype=np.int32).reshape(-1)
    foreign = array[(array < 0) | (array >= vocab_size)]
    if foreign.size:
        raise UserError(f"token {foreign[0]} is not in the vocabulary of {vocab_size}")
    return array


class Window(NamedTuple):
    """B sequences in S slots, their KV cache, and the logits of the next tokens."""

    tokens: Int[Array, "B S+1"]  # the last entry is for a token that no longer fits
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]  # whether the end token was sampled
    drawn: Int[Array, ""]  # number of sampling steps
    log_probs: Float[Array, "B S+1"]  # of sampled tokens, nats; the model's own distribution
    steps: Int[Array, "B S+1"]  # descent steps behind the logits of a sampled token
    next_logits: Float[Array, "B V"]
    next_steps: Int[Array, "B"]
    cache: dict[str, jax.Array]


@partial(jax.jit, static_argnames=("model", "decoding", "slots"))
def read(
    model: LanguageModel,
    variables: Variables,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    done: Bool[Array, "B"],
    drawn: Int[Array, ""],
    *,
    decoding: Decoding,
    slots: int,
) -> Window:
    """Prefill prompts into a new window."""
    batch, apply = len(tokens), cast(Any, model.apply)
    cache = apply(variables, batch, slots, decoding.cache, method=model.empty_cache)
    logits, cache, steps = apply(variables, tokens, lengths, cache, decoding, method=model.prefill)
    place = lambda dtype: jnp.zeros((batch, slots + 1), dtype)
    text = place(jnp.int32).at[:, : tokens.shape[1]].set(tokens)
    last = jnp.take_along_axis(steps, lengths[:, None] - 1, axis=1)[:, 0]
    return Window(
        text, lengths, done, drawn, place(jnp.float32), place(jnp.int32), logits, last, cache
    )


@partial(
    jax.jit,
    static_argnames=("model", "decoding", "on", "num_symbols"),
    donate_argnames="window",
)
def decode_until(
    model: LanguageModel,
    variables: Variables,
    window: Window,
    until_drawn: Int[Array, ""],
    key: Key,
    end_token: Int[Array, ""],
    sampling: Sampling,
    *,
    decoding: Decoding,
    on: Switches,
    num_symbols: int,
) -> Window:
    """Decode until `drawn` is `until_drawn`, all sequences have ended, or one needs another slot.

    Only changes of static arguments recompile: the numbers of `sampling` may change between calls.
    """
    apply = cast(Any, model.apply)
    rows = jnp.arange(len(window.tokens))
    slots = window.tokens.shape[1] - 1

    def unfinished(w: Window):
        full = jnp.any(~w.done & (w.lengths > slots))
        return (w.drawn < until_drawn) & ~jnp.all(w.done) & ~full

    def add_token(w: Window):
        logits = of_symbols(w.next_logits, num_symbols)
        present = _present(w, num_symbols) if on.repetition_penalty else None
        token = next_token(jax.random.fold_in(key, w.drawn), logits, sampling, on, present)
        log_prob = jax.nn.log_softmax(logits)[rows, token]
        done = w.done | (token == end_token)
        at = (rows, w.lengths)  # of an ended row: after its text, an unused entry
        lengths = jnp.where(done, w.lengths, w.lengths + 1)
        position = jnp.minimum(lengths - 1, slots - 1)
        logits, cache, steps = apply(
            variables, token, position, w.cache, decoding, ~done, method=model.decode
        )
        return Window(
            tokens=w.tokens.at[at].set(token),
            lengths=lengths,
            done=done,
            drawn=w.drawn + 1,
            log_probs=w.log_probs.at[at].set(log_prob),
            steps=w.steps.at[at].set(w.next_steps),
            next_logits=logits,
            next_steps=steps,
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, add_token, window)


def _present(w: Window, num_symbols: int) -> Bool[Array, "B V"]:
    """Return which tokens of the vocabulary occur in each sequence."""
    written = jnp.arange(w.tokens.shape[1])[None] < w.lengths[:, None]
    marks = jnp.zeros((len(w.tokens), num_symbols), bool)
    return marks.at[jnp.arange(len(w.tokens))[:, None], w.tokens].max(written)
