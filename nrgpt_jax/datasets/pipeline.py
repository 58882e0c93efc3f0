"""Token streams to batches: shuffled windows for training, a fixed cover for validation.

The order of training windows is a function of the seed alone. Batch k holds the windows
k*batch_size .. (k+1)*batch_size - 1 of that order, one a row, and each process reads those rows
that its devices hold; so neither processes nor devices change what a batch is. Shuffling, epochs
and reading ahead are grain's; windows that overlap, rows by device and validation in order are not.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import grain
import numpy as np

from nrgpt_jax.array_types import Batch
from nrgpt_jax.datasets.streams import Stream
from nrgpt_jax.errors import UserError

Rows: TypeAlias = Sequence[int] | np.ndarray
"""Numbers of rows of a batch."""


class Windows:
    """Every window of `length` tokens and their successors, by the place where it starts."""

    def __init__(self, stream: Stream, length: int):
        self._stream, self._length = stream, length

    def __len__(self) -> int:
        return len(self._stream) - self._length

    def __getitem__(self, start) -> Batch:
        return _window(self._stream, int(start), self._length)


def _window(stream: Stream, start: int, length: int) -> Batch:
    """The inputs from `start` on; what is past the end of the stream has weight 0."""
    count = min(length + 1, len(stream) - start)
    read, weights = stream.read(start, count)
    tokens, weight = np.zeros(length + 1, np.int32), np.zeros(length + 1, np.float32)
    tokens[:count] = read
    weight[:count] = 1.0 if weights is None else weights
    return Batch(tokens[:-1], tokens[1:], weight[1:])


def check_length(stream: Stream, context_length: int, split: str) -> None:
    """Raises UserError when a stream is too short to hold one window."""
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
    """An endless iterator over batches, from number `first` on.

    Windows start anywhere; each epoch visits every start once, in a new random order.

    Args:
      stream: the split.
      context_length: N.
      batch_size: B, rows of a batch in all.
      seed: of the order.
      rows: the numbers of those that are wanted; None: all.
      first: the number of the first batch.
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
    """Consecutive windows that predict every token of the split once (but for its first).

    Args:
      stream: the split.
      context_length: N.
      batch_size: B of every batch; the last is padded with windows of weight 0.
      max_windows: evaluate at most this many windows, evenly spaced; None takes all.
      rows: the numbers of the rows that are wanted of each batch; None: all.
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
