"""Tokenizers of Hugging Face's `tokenizers` library: a `tokenizer.json`, or a name on the hub.

The library encodes and decodes; special tokens, padding and errors follow this package.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nrgpt_jax.errors import UserError

PREFIX = "hf:"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # in order of preference
INSTALL = "pip install 'nrgpt-jax[tokenizers]'"


class HfTokenizer:
    """A tokenizer of the library. A run records it whole and needs no file or hub to open it.

    It neither truncates nor pads, whatever its file says, and text that looks like a special token
    is ordinary text. Texts of more than a megabyte are encoded in pieces, so a tokenizer that
    prepends a space (Metaspace) prepends one to each piece.

    Args:
      content: the text of a `tokenizer.json`.

    Raises:
      UserError: the library is not installed.
      ValueError: the text does not describe a tokenizer.
    """

    kind = "hf"

    def __init__(self, content: str):
        library = _library()
        try:
            self._own = library.Tokenizer.from_str(content)
        except Exception as error:  # the library raises `Exception` itself
            raise ValueError(" ".join(str(error).split())[:200]) from None
        self._own.no_truncation()
        self._own.no_padding()
        self._own.encode_special_tokens = True
        self.content = self._own.to_str()
        names = self._own.get_vocab(with_added_tokens=True)
        self.size = max(names.values(), default=-1) + 1
        self.end = next((names[name] for name in ENDS if name in names), None)

    @property
    def vocabulary(self) -> list[str]:
        """The name of every token."""
        return [self._own.id_to_token(token) or f"<{token}>" for token in range(self.size)]

    def encode(self, text: str) -> np.ndarray:
        """Encode text as tokens (N,) int32, without added special tokens."""
        try:
            return np.array(self._own.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not UTF-8: {error.object[error.start]!r}") from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode tokens to text."""
        return self._own.decode([int(token) for token in tokens], skip_special_tokens=False)


def open_tokenizer(name: str) -> HfTokenizer:
    """Open the tokenizer `hf:FILE`, or `hf:NAME` from the hub.

    Raises:
      UserError: it does not exist, cannot be read or downloaded, or the library is missing.
    """
    place = name.removeprefix(PREFIX)
    try:
        if Path(place).is_file():
            return HfTokenizer(Path(place).read_text(encoding="utf-8"))
        return HfTokenizer(_library().Tokenizer.from_pretrained(place).to_str())
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        cure = "name a tokenizer.json, or a model on the hub"
        raise UserError(f"data.tokenizer={name!r} is not possible ({reason}): {cure}") from None


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"tokenizers of hf: need the library tokenizers: {INSTALL}") from None
    return tokenizers
