"""The compiled loop that makes text: a prompt is read once, then one token at a time.

A `Window` is the text of B sequences and the cache of their tokens; its arrays have a fixed
number of slots, so calls of the same bucket compile nothing.
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
    """The next power of two, so that few shapes are compiled; `limit` at most."""
    return min(max(SMALLEST_BUCKET, 1 << (count - 1).bit_length()), limit)


def as_tokens(tokens: ArrayLike, vocab_size: int) -> np.ndarray:
    """Tokens (n,) int32. Raises UserError naming one that is not in the vocabulary."""
    array = np.asarray(tokens, dtype=np.int32).reshape(-1)
    foreign = array[(array < 0) | (array >= vocab_size)]
    if foreign.size:
        raise UserError(f"token {foreign[0]} is not in the vocabulary of {vocab_size}")
    return array


class Window(NamedTuple):
    """B sequences in S slots, and what is known of the token that comes next in each."""

    tokens: Int[Array, "B S+1"]  # the last place is for a token that no longer fits
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]  # the end token was drawn
    drawn: Int[Array, ""]  # draws since the beginning
    log_probs: Float[Array, "B S+1"]  # of drawn tokens, under the model's own distribution
    steps: Int[Array, "B S+1"]  # that the state made from which a token was drawn
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
    """Reads prompts into a new window."""
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
    """Draws tokens until `until_drawn` were drawn, all sequences ended, or one needs another slot.

    Only what is static compiles again: numbers of `sampling` may change from call to call.
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
        at = (rows, w.lengths)  # of an ended row: behind its text, where nobody reads
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
    """Which tokens stand in each sequence."""
    written = jnp.arange(w.tokens.shape[1])[None] < w.lengths[:, None]
    marks = jnp.zeros((len(w.tokens), num_symbols), bool)
    return marks.at[jnp.arange(len(w.tokens))[:, None], w.tokens].max(written)
