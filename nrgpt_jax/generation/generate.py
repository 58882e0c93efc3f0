"""Text generation: batches of prompts of any lengths, by decoding with a KV cache.

    for text in generate(model, variables, prompts, 100): text.tokens

Source: the descent of one token, with the cached keys of past tokens as its context, is section 2
of NRGPT (arXiv 2512.16762) for one token at a time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nrgpt_jax import host
from nrgpt_jax.array_types import Variables
from nrgpt_jax.core.block import CACHES
from nrgpt_jax.core.descent import CRITERIA, Convergence
from nrgpt_jax.errors import UserError, require, require_choice
from nrgpt_jax.generation.decode import Window, as_tokens, bucket, decode_until, read
from nrgpt_jax.generation.sampling import Sampling, check_sampling, switches
from nrgpt_jax.limits import LARGEST_SEED
from nrgpt_jax.models import LanguageModel
from nrgpt_jax.models.decoding import Decoding, check_decoding

OVERFLOWS = ("slide", "refuse")
MOST_STEPS = 2**16
_MOST_SEQUENCES = 2**20
_LARGEST_COUNT = 2**31 - 1  # new tokens are counted in 32 bits


class Continuation(NamedTuple):
    """The new tokens of one prompt, without the end token, with log-probabilities and steps."""

    tokens: np.ndarray  # (n,) int32
    log_probs: np.ndarray  # (n,) float32, nats; under the model's own distribution
    steps: np.ndarray  # (n,) int32, descent steps behind the logits of the token


class Settings(NamedTuple):
    """The settings of text generation."""

    sampling: Sampling = Sampling()  # greedy
    cache: str = "exact"  # or fixed_point: only the keys of the final state of a token
    num_steps: int | None = None  # number of descent steps; None: as in training
    stopping: Convergence | None = None  # a token stops when it has converged
    overflow: str = "slide"  # at the context length, drop the oldest tokens; or refuse
    stride: int | None = None  # number of tokens to drop at once; None: half of the context


def generate(
    model: LanguageModel,
    variables: Variables,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    settings: Settings = Settings(),  # noqa: B008 (immutable)
    *,
    seed: int = 0,
    end_token: int | None = None,
    num_symbols: int | None = None,
) -> list[Continuation]:
    """Continue prompts of any lengths in one batch.

    When a sequence has filled the context length, its oldest `stride` tokens are dropped and the
    others are prefilled again from position 0. The rest of the batch is prefilled again in full,
    which only matters for a fixed-point cache: prefilled tokens descend exactly.

    Args:
      model: model from `create_model`.
      variables: parameters of the model.
      prompts: token arrays (length,), at least one token each.
      max_new_tokens: maximum number of tokens to add.
      settings: settings of the generation; by default greedy with an exact cache.
      seed: seed of the sampling.
      end_token: token that ends a sequence; None: a sequence never ends.
      num_symbols: tokens from here on are vocabulary padding and never sampled.

    Returns:
      The continuation of each prompt.

    Raises:
      UserError: a setting is out of range, a prompt is empty, the text does not fit the context
        and `overflow` is `refuse`, or the cache does not fit the memory.
    """
    pieces = stream(
        model,
        variables,
        prompts,
        max_new_tokens,
        settings,
        seed=seed,
        end_token=end_token,
        num_symbols=num_symbols,
        tokens_at_once=max_new_tokens,
    )
    of_prompts = zip(*pieces, strict=True)
    return [Continuation(*map(np.concatenate, zip(*p, strict=True))) for p in of_prompts]


def stream(
    model: LanguageModel,
    variables: Variables,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    settings: Settings = Settings(),  # noqa: B008 (immutable)
    *,
    seed: int = 0,
    end_token: int | None = None,
    num_symbols: int | None = None,
    tokens_at_once: int = 8,
) -> Iterator[list[Continuation]]:
    """Generate as `generate`, yielding after the first token and every `tokens_at_once` more.

    Yields:
      The new part of the continuation of each prompt, possibly empty.
    """
    check_settings(model, settings)
    _check_request(prompts, max_new_tokens, seed)
    model, variables = model.with_num_steps(variables, settings.num_steps or model.num_steps)
    slots = slots_for(model, prompts, max_new_tokens)
    _check_memory(model, variables, len(prompts), slots, settings.cache)
    texts = _fitting(prompts, model, max_new_tokens, settings.overflow)

    of_window: Any = {"decoding": Decoding(settings.cache, settings.stopping)}
    key, end = jax.random.key(seed), np.int32(-1 if end_token is None else end_token)
    begin = np.zeros(len(texts), bool), np.int32(0)
    window = read(model, variables, *_padded(texts, slots), *begin, slots=slots, **of_window)
    static = {**of_window, "on": switches(settings.sampling)}
    static["num_symbols"] = num_symbols or model.vocab_size
    draw_args = key, end, jax.tree.map(np.float32, settings.sampling)
    target, drawn, done = 1, 0, False
    while not done:
        before = np.asarray(window.lengths)
        window = decode_until(model, variables, window, np.int32(target), *draw_args, **static)
        yield _new_tokens(window, before)
        drawn, ended = int(window.drawn), np.asarray(window.done)
        done = drawn >= max_new_tokens or bool(ended.all())
        if drawn == target:
            target = min(drawn + tokens_at_once, max_new_tokens)
        if not done and int(np.max(window.lengths)) > slots:
            texts = _slide(window, slots, settings.stride or max(1, model.context_length // 2))
            del window  # free its cache before the next one is allocated
            state = *_padded(texts, slots), ended, np.int32(drawn)
            window = read(model, variables, *state, slots=slots, **of_window)


def _padded(texts: Sequence[np.ndarray], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts as one padded array (B,P), and their lengths."""
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    width = bucket(int(lengths.max()), slots)
    return np.stack([np.pad(text, (0, width - len(text))) for text in texts]), lengths


def _check_request(prompts: Sequence[np.ndarray], max_new_tokens: int, seed: int) -> None:
    allowed = f"between 1 and {_LARGEST_COUNT:,}"
    require(0 < max_new_tokens <= _LARGEST_COUNT, "max_new_tokens", max_new_tokens, allowed)
    require(0 <= seed <= LARGEST_SEED, "seed", seed, f"between 0 and {LARGEST_SEED:,}")
    require(
        len(prompts) <= _MOST_SEQUENCES, "prompts", len(prompts), f"at most {_MOST_SEQUENCES:,}"
    )
    if min(map(len, prompts), default=0) == 0:
        raise UserError("a prompt is empty; it needs at least one token")


def slots_for(model: LanguageModel, prompts: Sequence[np.ndarray], max_new_tokens: int) -> int:
    """Return the number of slots per sequence of the KV cache, at most the context length."""
    return bucket(max(map(len, prompts)) + max_new_tokens, model.context_length)


def cache_bytes(
    model: LanguageModel, variables: Variables, batch: int, slots: int, cache: str = "exact"
) -> int:
    """Return the size in bytes of the KV cache of `batch` sequences of `slots` tokens each."""
    make = lambda v: model.apply(v, batch, slots, cache, method=model.empty_cache)
    leaves = jax.tree.leaves(jax.eval_shape(make, variables))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def check_settings(model: LanguageModel, settings: Settings) -> None:
    """Raise UserError if a setting is out of range or not supported by the model."""
    check_sampling(settings.sampling)
    require_choice("cache", settings.cache, CACHES)
    require_choice("overflow", settings.overflow, OVERFLOWS)
    length, stride, steps = model.context_length, settings.stride, settings.num_steps
    fits = stride is None or 0 < stride <= length
    require(fits, "stride", stride, f"between 1 and the context length {length}")
    possible = steps is None or 0 < steps <= MOST_STEPS
    require(possible, "num_steps", steps, f"between 1 and {MOST_STEPS:,}")
    if settings.stopping is not None:
        require_choice("criterion", settings.stopping.criterion, CRITERIA)
        tolerance = settings.stopping.tolerance
        sound = 0 <= tolerance < math.inf
        require(sound, "tolerance", tolerance, "0 or more, and finite")
    check_decoding(model, Decoding(settings.cache, settings.stopping))


def _fitting(prompts, model, max_new_tokens: int, overflow: str) -> list[np.ndarray]:
    texts = [as_tokens(prompt, model.vocab_size) for prompt in prompts]
    length = model.context_length
    longest = max(map(len, texts))
    if overflow == "refuse" and longest + max_new_tokens > length:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context "
            f"length {length}; ask for fewer, or let the oldest leave (overflow=slide)"
        )
    return [text[-length:] for text in texts]


def _check_memory(model, variables, batch: int, slots: int, cache: str) -> None:
    needed, free = cache_bytes(model, variables, batch, slots, cache), host.free_memory()
    if free is not None and needed > free:
        smaller = ", or use cache=fixed_point"
        raise UserError(
            f"the cache of {batch} x {slots} tokens needs {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; continue fewer prompts at a time"
            + (smaller if model.has_energy and cache == "exact" else "")
        )


def _new_tokens(window: Window, before: np.ndarray) -> list[Continuation]:
    arrays = [np.asarray(a) for a in (window.tokens, window.log_probs, window.steps)]
    after = np.asarray(window.lengths)
    return [
        Continuation(*(array[row, start:stop] for array in arrays))
        for row, (start, stop) in enumerate(zip(before, after, strict=True))
    ]


def _slide(window: Window, slots: int, stride: int) -> list[np.ndarray]:
    """Return the texts of the window; full ones without their oldest tokens."""
    rows = zip(np.asarray(window.tokens), np.asarray(window.lengths), strict=True)
    return [row[min(stride, n - 1) if n > slots else 0 : n] for row, n in rows]
