"""Tokenizers: characters, bytes, GPT-2's byte pairs, symbols, Hugging Face's, and your own.

tiktoken and `tokenizers` encode byte pairs. Characters, bytes and symbols are a line of numpy each,
and each run keeps its tokenizer as `tokenizer.json`, which is checked here when it is opened.
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
MOST_SYMBOLS = 2**20  # of a vocabulary; Unicode has about as many characters
RESTORE = "restore it, or train again"


class Tokenizer(Protocol):
    """Text to integer tokens and back."""

    kind: str

    @property
    def size(self) -> int:
        """The number of tokens there are."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends a document or an answer, if there is one."""
        ...

    @property
    def vocabulary(self) -> list[str]:
        """The text of every token, in order; `<hexadecimal>` where it is not UTF-8 by itself."""
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
    """One token a UTF-8 byte; 256 of them."""

    kind = "byte"
    size = 256
    end = None
    vocabulary = [f"<{b:02x}>" for b in range(256)]

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)
        except UnicodeEncodeError as error:  # half of a pair, such as of bytes of a terminal
            raise UserError(f"the text is not UTF-8: {error.object[error.start]!r}") from None

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(t) for t in tokens).decode("utf-8", errors="replace")


class Gpt2Tokenizer:
    """GPT-2's byte pairs, by tiktoken, which fetches their table once and keeps it.

    `TIKTOKEN_CACHE_DIR` names the folder where tiktoken looks for the table. Text that looks like
    the token of the end, `<|endoftext|>`, is ordinary text.
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
    """The encoding. Raises UserError when its table is not here and cannot be fetched."""
    try:
        import tiktoken

        return tiktoken.get_encoding("gpt2")
    except ImportError:
        raise UserError(
            "the tokenizer gpt2 needs tiktoken: pip install 'nrgpt-jax[corpora]'"
        ) from None
    except Exception as error:  # requests, files, checksums: each has errors of its own
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
    """One token a symbol, symbols separated by commas: the notation of ListOps."""

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
    """Registers what makes a tokenizer of that `kind`, a choice of `config.data.tokenizer`.

    Its vocabulary is the same each time; a run records its module and imports that when opened.
    """
    return FIXED.register(kind, lambda make: make)


tokenizer(ByteTokenizer.kind)(ByteTokenizer)
tokenizer(Gpt2Tokenizer.kind)(Gpt2Tokenizer)


def create_tokenizer(name: str) -> Tokenizer:
    """A tokenizer with a vocabulary of its own, by its name in `config.data.tokenizer`.

    Raises:
      UserError: it cannot be read or fetched, or its library is not installed.
    """
    if name.startswith(PREFIX):
        return open_tokenizer(name)
    result = FIXED[name]()
    require(result.kind == name, "kind", result.kind, f"that of the tokenizer {name!r} is its name")
    return result


def as_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `from_record` makes the tokenizer of again; a fixed vocabulary is only named."""
    kind = tokenizer.kind
    if isinstance(tokenizer, HfTokenizer):
        return {"kind": kind, "content": tokenizer.content}
    if kind not in FIXED:
        return {"kind": kind, "vocabulary": tokenizer.vocabulary}
    own = list(plugins.describe([(FIXED, kind)]).values())
    return {"kind": kind, **({"module": own[0]["module"]} if own else {})}


def check_recordable(tokenizer: Tokenizer) -> None:
    """Raises UserError where a run could not be opened again with this tokenizer."""
    try:
        from_record(as_record(tokenizer))
    except ValueError as error:
        reason = f"a run with this tokenizer could not be opened again ({error})"
        cure = f"register what makes it: @nrgpt.tokenizer({tokenizer.kind!r})"
        raise UserError(f"{reason}; {cure}") from None


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """What `tokenizer.json` holds."""

    kind: str
    vocabulary: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_SYMBOLS)] | None = (
        None
    )
    content: str | None = None  # of a tokenizer of Hugging Face
    module: str | None = None  # of a tokenizer that a plugin registers


def from_record(record: Any) -> Tokenizer:
    """The tokenizer. Raises ValueError, of one line, where the record is none."""
    kind, vocabulary, content, module = msgspec.structs.astuple(
        msgspec.convert(record, Record, strict=True)
    )
    if kind == HfTokenizer.kind:
        return HfTokenizer(content or "")
    if module is not None and module != "__main__":
        plugins.load([module])
    if kind in FIXED:
        fixed = FIXED[kind]()
        if vocabulary is not None and len(vocabulary) != fixed.size:  # older ones list it
            raise ValueError(f"a {kind} tokenizer has {fixed.size:,} symbols")
        return fixed
    if kind not in CHOSEN:
        raise ValueError(f"there is no tokenizer {kind!r}")
    try:
        created = CHOSEN[kind](vocabulary or ())
        tokens = np.arange(created.size)
        sound = created.size and created.vocabulary == vocabulary
        sound = sound and np.array_equal(created.encode(created.decode(tokens)), tokens)
    except (TypeError, UserError):  # of symbols that are none, or two
        sound = False
    if not sound:
        allowed = "sorted characters" if kind == CharTokenizer.kind else "symbols without commas"
        raise ValueError(f"its vocabulary is not one of different {allowed}")
    return created


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes `tokenizer.json`, whole or not at all. Raises OSError."""
    disk.write_json(path, as_record(tokenizer))


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads `tokenizer.json`. Raises UserError when it is missing or damaged."""
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
