"""Token streams to batches: shuffled windows for training, a fixed cover for validation.

The order of training windows is a function of the seed alone. Batch k holds the windows
k*batch_size .. (k+1)*batch_size - 1 of that order, and each process reads its own slice of it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from nrgpt_jax.errors import UserError


class Batch(NamedTuple):
    """Inputs and the tokens that follow them; weight 0 marks padding."""

    inputs: np.ndarray  # (B,N) int32
    targets: np.ndarray  # (B,N) int32
    weights: np.ndarray  # (B,N) float32


class Windows:
    """Every window of `length` + 1 consecutive tokens, by the place where it starts."""

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return len(self._tokens) - self._length

    def __getitem__(self, start) -> np.ndarray:
        return self._tokens[start : start + self._length + 1]


def check_length(tokens: np.ndarray, context_length: int, split: str) -> None:
    """Raises UserError when a stream is too short to hold one window."""
    if len(tokens) <= context_length:
        raise UserError(
            f"the {split} split has {len(tokens)} tokens, model.context_length="
            f"{context_length} needs {context_length + 1}; lower it, give more text, or change "
            "data.validation_fraction"
        )


def train_batches(
    tokens: np.ndarray,
    context_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless, checkpointable iterator over (batch_size / process_count, N+1) windows.

    Windows start anywhere; each epoch visits every start once, in a new random order.
    """
    check_length(tokens, context_length, "train")
    windows = grain.MapDataset.source(Windows(tokens, context_length)).seed(seed).shuffle()
    local = windows.repeat()[process_index::process_count].batch(batch_size // process_count)
    return iter(local.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def validation_batches(
    tokens: np.ndarray, context_length: int, batch_size: int, max_windows: int | None = None
) -> Iterator[Batch]:
    """Consecutive windows that predict every token of the split once (but for its first).

    Args:
      tokens: the split, (tokens,).
      context_length: N.
      batch_size: B of every batch; the last is padded with windows of weight 0.
      max_windows: evaluate at most this many windows, evenly spaced; None takes all.
    """
    check_length(tokens, min(context_length, 1), "validation")
    starts = np.arange(0, len(tokens) - 1, context_length)
    if max_windows is not None and max_windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, max_windows).astype(int)]
    padded = np.pad(tokens, (0, context_length))
    for i in range(0, len(starts), batch_size):
        chosen = starts[i : i + batch_size]
        real = len(chosen)
        chosen = np.pad(chosen, (0, batch_size - real), mode="edge")
        places = chosen[:, None] + np.arange(context_length + 1)
        weights = (places[:, 1:] < len(tokens)) & (np.arange(batch_size) < real)[:, None]
        window = padded[places]
        yield Batch(window[:, :-1], window[:, 1:], weights.astype(np.float32))
