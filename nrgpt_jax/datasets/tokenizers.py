"""Tokenizers: characters, bytes, or ListOps symbols, kept in each run as `tokenizer.json`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nrgpt_jax.errors import UserError


class Tokenizer(Protocol):
    """Text to integer tokens and back."""

    kind: str

    @property
    def vocabulary(self) -> list[str]:
        """The text of every token, in order; its length is the vocabulary size."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Tokens (N,) int32. Raises UserError naming what is not in the vocabulary."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        ...


class CharTokenizer:
    """One token a character; the vocabulary is sorted."""

    kind = "char"

    def __init__(self, vocabulary: Iterable[str]):
        self.vocabulary = sorted(set(vocabulary))
        self._codes = np.array([ord(c) for c in self.vocabulary], dtype=np.uint32)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        tokens = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = np.unique(codes[self._codes[tokens] != codes])
        if unknown.size:
            raise UserError(_unknown_message([chr(c) for c in unknown], self.vocabulary))
        return tokens.astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.vocabulary[t] for t in tokens)


class ByteTokenizer:
    """One token a UTF-8 byte; 256 of them."""

    kind = "byte"

    def __init__(self, vocabulary: Iterable[str] = ()):
        del vocabulary
        self.vocabulary = [f"<{b:02x}>" for b in range(256)]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(t) for t in tokens).decode("utf-8", errors="replace")


class SymbolTokenizer:
    """One token a symbol, symbols separated by commas: the notation of ListOps."""

    kind = "symbol"

    def __init__(self, vocabulary: Iterable[str]):
        self.vocabulary = list(vocabulary)
        self._index = {symbol: i for i, symbol in enumerate(self.vocabulary)}

    def encode(self, text: str) -> np.ndarray:
        symbols = [symbol.strip() for symbol in text.split(",") if symbol.strip()]
        unknown = sorted(set(symbols) - set(self._index))
        if unknown:
            raise UserError(_unknown_message(unknown, self.vocabulary))
        return np.array([self._index[symbol] for symbol in symbols], dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return ",".join(self.vocabulary[t] for t in tokens)


def _unknown_message(unknown: list[str], vocabulary: list[str]) -> str:
    named = " ".join(repr(symbol) for symbol in unknown[:10])
    known = " ".join(repr(s) for s in vocabulary[:80])
    return f"not in the vocabulary: {named}; the {len(vocabulary)} known symbols are {known}"


KINDS = {c.kind: c for c in (CharTokenizer, ByteTokenizer, SymbolTokenizer)}


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes `tokenizer.json`."""
    record = {"kind": tokenizer.kind, "vocabulary": tokenizer.vocabulary}
    path.write_text(json.dumps(record, ensure_ascii=True, indent=1))


def _checked_vocabulary(record: Any) -> list[str]:
    vocabulary = record["vocabulary"]
    if not isinstance(vocabulary, list) or not all(isinstance(s, str) for s in vocabulary):
        raise ValueError("its vocabulary is not a list of texts")
    if not vocabulary or len(set(vocabulary)) < len(vocabulary):
        raise ValueError("its vocabulary is empty, or names a symbol twice")
    long = next((symbol for symbol in vocabulary if len(symbol) != 1), None)
    if record["kind"] == CharTokenizer.kind and long is not None:
        raise ValueError(f"{long!r} in its vocabulary is not one character")
    return vocabulary


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads `tokenizer.json`. Raises UserError when it is missing or damaged."""
    try:
        record = json.loads(path.read_text())
        return KINDS[record["kind"]](_checked_vocabulary(record))
    except FileNotFoundError:
        raise UserError(f"no tokenizer in {path.parent}: is it a run directory?") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it or train again") from None
