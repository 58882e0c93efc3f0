"""Token streams: the tokens of a split, in memory or in shards that are read in place.

A window starts at any token, so it is cut from one or more array_record records.
"""

import abc
import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError


class Stream(abc.ABC):
    """The tokens of a split in order, and whether each is to be predicted."""

    @staticmethod
    def of(tokens: np.ndarray, weights: np.ndarray | None = None) -> "ArrayStream":
        """Create a stream of tokens (tokens,) in memory, with their loss weights (tokens,).

        Without weights every token counts.
        """
        return ArrayStream(tokens, weights)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens (tokens,) int32; the stream must fit in memory."""
        return self.read(0, len(self))[0].astype(np.int32)

    def first(self, count: int) -> "Stream":
        """Return a stream of the first `count` tokens, or of all if there are fewer."""
        return self if count >= len(self) else _Beginning(self, count)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of tokens."""

    @abc.abstractmethod
    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Read a window.

        Args:
          start: the position of its first token, 0 or more.
          count: the number of tokens, all of them in the stream.

        Returns:
          tokens (count,) of an integer dtype, and their loss weights (count,) float32, each
          0 or 1; None if all are 1.

        Raises:
          UserError: the underlying data are damaged.
        """


class ArrayStream(Stream):
    """Tokens in memory, in the smallest unsigned dtype that holds them."""

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
        self._complete, self._count = complete, count

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self._complete.read(start, count)


class Shard(NamedTuple):
    """A file of records; every record but the last holds `record_tokens` tokens."""

    path: Path
    num_tokens: int


class RecordStream(Stream):
    """Tokens in array_record shards, read in place.

    A window costs one read per record that it touches. Memory holds the index of the shards that
    were read from: about 45 MB for a million records (4 * 10^9 tokens). Threads may read
    concurrently; a copy in another process opens the files again.
    """

    def __init__(
        self, shards: Sequence[Shard], record_tokens: int, features: Any, cure: str | None = None
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._shards = [shard for shard in shards if shard.num_tokens]
        self._record_tokens, self._features = record_tokens, features
        self._cure = cure or (  # the advice for a damaged shard
            "remove it and dataset_info.json beside it, and prepare the data again"
        )
        self._ends = list(itertools.accumulate(shard.num_tokens for shard in self._shards))
        counts = [-(-shard.num_tokens // record_tokens) for shard in self._shards]
        self._first_records = [0, *itertools.accumulate(counts)]
        # Given the number of records, array_record opens a file when it is read.
        paths = [f"{s.path}[0:{n}]" for s, n in zip(self._shards, counts, strict=True)]
        options = {"max_parallelism": "0"}
        self._records: Any = ArrayRecordDataSource(paths, options) if paths else []

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        start, parts = int(start), [np.zeros(0, np.uint8)]
        end = start + count
        while start < end:
            which = bisect.bisect_right(self._ends, start)
            begin = self._ends[which - 1] if which else 0
            number, offset = divmod(start - begin, self._record_tokens)
            parts.append(self._record(which, number)[offset : offset + end - start])
            start += len(parts[-1])
        return parts[-1] if len(parts) < 3 else np.concatenate(parts[1:]), None

    def _record(self, which: int, number: int) -> np.ndarray:
        path, num_tokens = self._shards[which]
        try:
            record = self._records[self._first_records[which] + number]
            tokens = self._features.deserialize_example_np(record)["tokens"]
            if len(tokens) != min(self._record_tokens, num_tokens - number * self._record_tokens):
                raise ValueError(f"record {number} has {len(tokens)} tokens")
        except Exception as error:  # array_record raises many error types
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is damaged or gone ({reason}); {self._cure}") from None
        return tokens


def ends_with(new: np.ndarray, answer: np.ndarray) -> float:
    """Return 1 if the new tokens end with the answer, else 0."""
    answer = np.atleast_1d(answer)
    return float(len(new) >= len(answer) and np.array_equal(new[len(new) - len(answer) :], answer))


class Prompts(NamedTuple):
    """Prompts with their answers, each of any number of tokens."""

    prompts: list[np.ndarray]  # each (length,) int32
    answers: Sequence[Any] | np.ndarray  # each a token, or tokens (n,)
    end: int  # the token that ends an answer
    num_symbols: int  # the tokenizer's vocabulary size; a model may have more logits
    # (new tokens (n,) without the end token, answer) -> score from 0 to 1
    score: Callable[[np.ndarray, Any], float] = ends_with


class Dataset(NamedTuple):
    """The token stream of each split, their tokenizer, and prompt sets by name."""

    train: Stream
    validation: Stream
    tokenizer: Tokenizer
    prompts: Mapping[str, Prompts]
    fingerprint: str  # identifies the content; recorded by runs
