"""Streams of tokens: what a split is, in memory or in shards that are read in place."""

import abc
import bisect
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nrgpt_jax.errors import UserError


class Stream(abc.ABC):
    """A split: its tokens in order, and whether each is to be predicted."""

    @staticmethod
    def of(tokens: np.ndarray, weights: np.ndarray | None = None) -> "ArrayStream":
        """A stream of tokens (tokens,) in memory, with the weights (tokens,) of predicting them.

        Without weights every token counts.
        """
        return ArrayStream(tokens, weights)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens (tokens,) int32, of a stream that fits in memory."""
        return self.read(0, len(self))[0].astype(np.int32)

    def first(self, count: int) -> "Stream":
        """Its first N tokens, or all there are."""
        return self if count >= len(self) else _Beginning(self, count)

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of tokens."""

    @abc.abstractmethod
    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A window.

        Args:
          start: the place of its first token, 0 or more.
          count: tokens, all of them in the stream.

        Returns:
          tokens (count,) of an integer type, and the weight (count,) float32 of predicting each,
          0 or 1; None where all are one.

        Raises:
          UserError: what the stream is read from is damaged.
        """


class ArrayStream(Stream):
    """Tokens in memory, in the smallest unsigned type that holds them."""

    def __init__(self, tokens: np.ndarray, weights: np.ndarray | None = None):
        largest = int(tokens.max()) if len(tokens) else 0
        self._tokens = tokens.astype(np.min_scalar_type(largest), copy=False)
        all_count = weights is None or bool(np.all(weights == 1))
        self._weights = None if all_count else np.asarray(weights, np.float32)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        window = slice(start, start + count)
        return self._tokens[window], None if self._weights is None else self._weights[window]


class _Beginning(Stream):
    def __init__(self, complete: Stream, count: int):
        self._source, self._count = complete, count

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self._source.read(start, count)


class Shard(NamedTuple):
    """A file of records; each but the last holds `record_tokens` tokens."""

    path: Path
    num_tokens: int


class RecordStream(Stream):
    """Tokens in array_record shards, read in place.

    A window costs one read for each record that it touches. What stays in memory is the index of
    the shards that were read from: about 45 MB for a million records (4 * 10^9
    tokens). Threads may read together; a copy in another process opens the files again.
    """

    def __init__(
        self, shards: Sequence[Shard], record_tokens: int, features: Any, cure: str | None = None
    ):
        self._shards = [shard for shard in shards if shard.num_tokens]
        self._record_tokens, self._features = record_tokens, features
        self._cure = cure or (  # what to do about a shard that is damaged
            "remove it and dataset_info.json beside it, and prepare the data again"
        )
        self._ends = list(itertools.accumulate(shard.num_tokens for shard in self._shards))
        self._open()

    def _open(self) -> None:
        self._readers: list[Any] = [None] * len(self._shards)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        unshared = ("_readers", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in unshared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        if not count:
            return np.zeros(0, np.uint8), None
        start, parts = int(start), []
        which = bisect.bisect_right(self._ends, start)
        start -= self._ends[which - 1] if which else 0
        while count:
            taken = min(count, self._shards[which].num_tokens - start)
            parts += self._read_shard(which, start, taken)
            which, start, count = which + 1, 0, count - taken
        return parts[0] if len(parts) == 1 else np.concatenate(parts), None

    def _read_shard(self, which: int, start: int, count: int) -> list[np.ndarray]:
        size, end = self._record_tokens, start + count
        first, last = start // size, (end - 1) // size
        records = self._records(which, range(first, last + 1))
        records[-1] = records[-1][: end - last * size]
        records[0] = records[0][start - first * size :]
        return records

    def _records(self, which: int, indices: Sequence[int]) -> list[np.ndarray]:
        try:
            records = self._reader(which).read(list(indices))
            return [self._features.deserialize_example_np(r)["tokens"] for r in records]
        except Exception as error:  # array_record raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._shards[which].path} is damaged or gone ({reason}); {self._cure}"
            ) from None

    def _reader(self, which: int) -> Any:
        if self._readers[which] is None:
            with self._lock:
                if self._readers[which] is None:
                    self._readers[which] = open_shard(self._shards[which].path)
        return self._readers[which]


def open_shard(path: Path):
    """An array_record reader for random access."""
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(
        str(path),
        options="readahead_buffer_size:0,max_parallelism:0",
        file_reader_buffer_size=32768,
    )
