"""Tokenizers: characters, bytes, GPT-2's BPE, symbols, Hugging Face's, and registered ones.

tiktoken and `tokenizers` implement byte-pair encoding; characters, bytes and symbols are a line of
numpy each. A run records its tokenizer as `tokenizer.json`, which is validated when it is opened.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np

from nrgpt_jax import disk, plugins
from nrgpt_jax.datasets.hf_tokenizer import PREFIX, HfTokenizer, open_tokenizer
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.registry import Registry

EOS = "<eos>"
MOST_SYMBOLS = 2**20  # in a vocabulary; Unicode has about as many characters
RESTORE = "restore it, or train again"


class Tokenizer(Protocol):
    """A map from text to integer tokens and back."""

    kind: str

    @property
    def size(self) -> int:
        """The size of the vocabulary."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends a document or an answer; None if there is none."""
        ...

    @property
    def vocabulary(self) -> list[str]:
        """The text of every token, in order; `<hexadecimal>` where it is not UTF-8 by itself."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return tokens (N,) int32. Raises UserError naming symbols outside the vocabulary."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens."""
        ...


class CharTokenizer:
    """One token per character; the vocabulary is sorted."""

    kind = "char"
    end = None

    def __init__(self, vocabulary: Iterable[str]):
        self.vocabulary = sorted(set(vocabulary))
        self.size = len(self.vocabulary)
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
    """One token per UTF-8 byte, from a vocabulary of 256."""

    kind = "byte"
    size = 256
    end = None
    vocabulary = [f"<{b:02x}>" for b in range(256)]

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)
        except UnicodeEncodeError as error:  # a lone surrogate, as from bytes of a terminal
            raise UserError(f"the text is not UTF-8: {error.object[error.start]!r}") from None

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(t) for t in tokens).decode("utf-8", errors="replace")


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken, which downloads its table once and caches it.

    `TIKTOKEN_CACHE_DIR` names the cache folder of tiktoken. Text that looks like the end token,
    `<|endoftext|>`, is ordinary text.
    """

    kind = "gpt2"
    size = 50257
    end = 50256

    @property
    def vocabulary(self) -> list[str]:
        return [_name(piece) for piece in _gpt2().decode_tokens_bytes(list(range(self.size)))]

    def encode(self, text: str) -> np.ndarray:
        return np.array(_gpt2().encode_ordinary(text), dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return _gpt2().decode([int(t) for t in tokens], errors="replace")


@functools.cache
def _gpt2():
    """Return the encoding. Raises UserError if its table is not cached and cannot be downloaded."""
    try:
        import tiktoken

        return tiktoken.get_encoding("gpt2")
    except ImportError:
        raise UserError(
            "the tokenizer gpt2 needs tiktoken: pip install 'nrgpt-jax[corpora]'"
        ) from None
    except Exception as error:  # requests, files and checksums raise their own error types
        reason = " ".join(str(error).split())
        raise UserError(
            f"the GPT-2 vocabulary cannot be fetched ({reason[:200]}); set TIKTOKEN_CACHE_DIR to "
            "the folder of a machine where tiktoken has fetched it"
        ) from None


def _name(piece: bytes) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{piece.hex()}>"


class SymbolTokenizer:
    """One token per comma-separated symbol: the notation of ListOps."""

    kind = "symbol"

    def __init__(self, vocabulary: Iterable[str]):
        self.vocabulary = list(vocabulary)
        self.size = len(self.vocabulary)
        self._index = {symbol: i for i, symbol in enumerate(self.vocabulary)}
        self.end = self._index.get(EOS)

    def encode(self, text: str) -> np.ndarray:
        symbols = [symbol.strip() for symbol in text.split(",") if symbol.strip()]
        unknown = sorted(set(symbols) - set(self._index))
        if unknown:
            message = _unknown_message(unknown, self.vocabulary)
            raise UserError(f"{message}, with commas between them")
        return np.array([self._index[symbol] for symbol in symbols], dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return ",".join(self.vocabulary[t] for t in tokens)


def _unknown_message(unknown: list[str], vocabulary: list[str]) -> str:
    named = " ".join(repr(symbol) for symbol in unknown[:10])
    known = " ".join(repr(s) for s in vocabulary[:80])
    return f"not in the vocabulary: {named}; the {len(vocabulary)} known symbols are {known}"


FIXED: Registry[Callable[[], Tokenizer]] = Registry("tokenizer")
CHOSEN = {c.kind: c for c in (CharTokenizer, SymbolTokenizer)}


def tokenizer(kind: str) -> Callable[[Callable[[], Tokenizer]], Any]:
    """Register a factory of tokenizers of a `kind`, a choice of `config.data.tokenizer`.

    The vocabulary must be fixed. A run records the module of the factory and imports it on opening.
    """
    return FIXED.register(kind, lambda make: make)


tokenizer(ByteTokenizer.kind)(ByteTokenizer)
tokenizer(Gpt2Tokenizer.kind)(Gpt2Tokenizer)


def create_tokenizer(name: str) -> Tokenizer:
    """Create a tokenizer with a fixed vocabulary by its name in `config.data.tokenizer`.

    Raises:
      UserError: it cannot be read or downloaded, or its library is not installed.
    """
    if name.startswith(PREFIX):
        return open_tokenizer(name)
    result = FIXED[name]()
    require(result.kind == name, "kind", result.kind, f"that of the tokenizer {name!r} is its name")
    return result


def as_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the record that `from_record` reads; a fixed vocabulary is recorded by kind only."""
    kind = tokenizer.kind
    if isinstance(tokenizer, HfTokenizer):
        return {"kind": kind, "content": tokenizer.content}
    if kind not in FIXED:
        return {"kind": kind, "vocabulary": tokenizer.vocabulary}
    own = list(plugins.describe([(FIXED, kind)]).values())
    return {"kind": kind, **({"module": own[0]["module"]} if own else {})}


def check_recordable(tokenizer: Tokenizer) -> None:
    """Raise UserError if a run with this tokenizer could not be opened again."""
    try:
        from_record(as_record(tokenizer))
    except ValueError as error:
        reason = f"a run with this tokenizer could not be opened again ({error})"
        cure = f"register what makes it: @nrgpt.tokenizer({tokenizer.kind!r})"
        raise UserError(f"{reason}; {cure}") from None


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of `tokenizer.json`."""

    kind: str
    vocabulary: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_SYMBOLS)] | None = (
        None
    )
    content: str | None = None  # the file of a Hugging Face tokenizer
    module: str | None = None  # the module of a registered tokenizer


def from_record(record: Any) -> Tokenizer:
    """Create the tokenizer of a record. Raises ValueError, in one line, if it is invalid."""
    kind, vocabulary, content, module = msgspec.structs.astuple(
        msgspec.convert(record, Record, strict=True)
    )
    if kind == HfTokenizer.kind:
        return HfTokenizer(content or "")
    if module is not None and module != "__main__":
        plugins.load([module])
    if kind in FIXED:
        fixed = FIXED[kind]()
        if vocabulary is not None and len(vocabulary) != fixed.size:  # older records list it
            raise ValueError(f"a {kind} tokenizer has {fixed.size:,} symbols")
        return fixed
    if kind not in CHOSEN:
        raise ValueError(f"there is no tokenizer {kind!r}")
    try:
        created = CHOSEN[kind](vocabulary or ())
        tokens = np.arange(created.size)
        sound = created.size and created.vocabulary == vocabulary
        sound = sound and np.array_equal(created.encode(created.decode(tokens)), tokens)
    except (TypeError, UserError):  # an entry is not exactly one symbol
        sound = False
    if not sound:
        allowed = "sorted characters" if kind == CharTokenizer.kind else "symbols without commas"
        raise ValueError(f"its vocabulary is not one of different {allowed}")
    return created


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer.json` atomically. Raises OSError."""
    disk.write_json(path, as_record(tokenizer))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read `tokenizer.json`. Raises UserError if it is missing or damaged."""
    try:
        record = disk.read_json(path, object, RESTORE)
    except FileNotFoundError:
        raise UserError(f"no tokenizer in {path.parent}: is it a run directory?") from None
    try:
        return from_record(record)
    except UserError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({reason}); {RESTORE}") from None
