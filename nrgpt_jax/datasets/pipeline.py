"""Batches of token streams: shuffled windows for training, a fixed cover for validation.

The order of training windows is a function of the seed alone. Batch k holds the windows
k*batch_size .. (k+1)*batch_size - 1 of that order, one per row. Each process reads the rows of its
devices, so a batch does not depend on the number of processes or devices. Grain shuffles, repeats
epochs and prefetches; overlapping windows, rows by device and ordered validation are done here.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import grain
import numpy as np

from nrgpt_jax.array_types import Batch
from nrgpt_jax.datasets.streams import Stream
from nrgpt_jax.errors import UserError

Rows: TypeAlias = Sequence[int] | np.ndarray
"""Row indices of a batch."""


class Windows:
    """All windows of `length` tokens and their successors, indexed by start position."""

    def __init__(self, stream: Stream, length: int):
        self._stream, self._length = stream, length

    def __len__(self) -> int:
        return len(self._stream) - self._length

    def __getitem__(self, start) -> Batch:
        return _window(self._stream, int(start), self._length)


def _window(stream: Stream, start: int, length: int) -> Batch:
    """Return the window from `start` on; positions past the end of the stream have weight 0."""
    count = min(length + 1, len(stream) - start)
    read, weights = stream.read(start, count)
    tokens, weight = np.zeros(length + 1, np.int32), np.zeros(length + 1, np.float32)
    tokens[:count] = read
    weight[:count] = 1.0 if weights is None else weights
    return Batch(tokens[:-1], tokens[1:], weight[1:])


def check_length(stream: Stream, context_length: int, split: str) -> None:
    """Raise UserError if a stream is too short to hold one window."""
    if len(stream) <= context_length:
        raise UserError(
            f"the {split} split has {len(stream)} tokens, model.context_length="
            f"{context_length} needs {context_length + 1}; lower it, give more text, or change "
            "data.validation_fraction or data.train_fraction"
        )


def train_batches(
    stream: Stream,
    context_length: int,
    batch_size: int,
    seed: int,
    rows: Rows | None = None,
    first: int = 0,
) -> Iterator[Batch]:
    """Return an endless iterator over batches, from batch `first` on.

    Windows start at any token; each epoch visits every start once, in a new random order.

    Args:
      stream: the training split.
      context_length: N.
      batch_size: B, over all processes.
      seed: the seed of the order.
      rows: the indices of the rows to read; None: all.
      first: the index of the first batch.
    """
    check_length(stream, context_length, "train")
    windows = grain.MapDataset.source(Windows(stream, context_length)).seed(seed).shuffle()
    windows, chosen = windows.repeat(), range(batch_size) if rows is None else rows

    def batch(number: int) -> Batch:
        return _stacked(windows[number * batch_size + int(row)] for row in chosen)

    batches = grain.MapDataset.range(first, len(windows) // batch_size).map(batch)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(batches.to_iter_dataset(options))


def _stacked(windows: Iterable[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*windows, strict=True)))


def validation_batches(
    stream: Stream,
    context_length: int,
    batch_size: int,
    max_windows: int | None = None,
    rows: Rows | None = None,
) -> Iterator[Batch]:
    """Yield batches of consecutive windows that predict every token but the first once.

    Args:
      stream: the validation split.
      context_length: N.
      batch_size: B; the last batch is padded with windows of weight 0.
      max_windows: the maximum number of windows, evenly spaced; None: all.
      rows: the indices of the rows to read of each batch; None: all.
    """
    if len(stream) < 2:
        raise UserError("the validation split has nothing to predict; give more text")
    starts = np.arange(0, len(stream) - 1, context_length)
    if max_windows is not None and max_windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, max_windows).astype(int)]
    for i in range(0, len(starts), batch_size):
        chosen = starts[i : i + batch_size]
        batch = []
        for row in range(batch_size) if rows is None else rows:
            window = _window(stream, int(chosen[min(row, len(chosen) - 1)]), context_length)
            is_real = np.float32(row < len(chosen))
            batch.append(window._replace(weights=is_real * window.weights))
        yield _stacked(batch)
