"""Token streams to batches: shuffled windows for training, a fixed cover for validation.

The order of training windows is a function of the seed alone. Batch k holds the windows
k*batch_size .. (k+1)*batch_size - 1 of that order, and each process reads its own slice of it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from nrgpt_jax.datasets.streams import Stream
from nrgpt_jax.errors import UserError


class Batch(NamedTuple):
    """Inputs and the tokens that follow them; weight 0 marks what is not to be predicted."""

    inputs: np.ndarray  # (B,N) int32
    targets: np.ndarray  # (B,N) int32
    weights: np.ndarray  # (B,N) float32


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
            "data.validation_fraction"
        )


def train_batches(
    stream: Stream,
    context_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless, checkpointable iterator over batches of batch_size / process_count windows.

    Windows start anywhere; each epoch visits every start once, in a new random order.
    """
    check_length(stream, context_length, "train")
    windows = grain.MapDataset.source(Windows(stream, context_length)).seed(seed).shuffle()
    local = windows.repeat()[process_index::process_count].batch(batch_size // process_count)
    return iter(local.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def validation_batches(
    stream: Stream, context_length: int, batch_size: int, max_windows: int | None = None
) -> Iterator[Batch]:
    """Consecutive windows that predict every token of the split once (but for its first).

    Args:
      stream: the split.
      context_length: N.
      batch_size: B of every batch; the last is padded with windows of weight 0.
      max_windows: evaluate at most this many windows, evenly spaced; None takes all.
    """
    if len(stream) < 2:
        raise UserError("the validation split has nothing to predict; give more text")
    starts = np.arange(0, len(stream) - 1, context_length)
    if max_windows is not None and max_windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, max_windows).astype(int)]
    for i in range(0, len(starts), batch_size):
        windows = [_window(stream, int(at), context_length) for at in starts[i : i + batch_size]]
        last = windows[-1]
        padding = last._replace(weights=np.zeros_like(last.weights))
        windows += [padding] * (batch_size - len(windows))
        yield Batch(*map(np.stack, zip(*windows, strict=True)))
