"""Text corpora: tiny Shakespeare, or any UTF-8 file or folder of the user's own."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nrgpt_jax.datasets.download import fetch
from nrgpt_jax.datasets.records import TextBuilder
from nrgpt_jax.errors import UserError

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Shakespeare(TextBuilder):
    """Tiny Shakespeare."""

    name = "shakespeare"
    DESCRIPTION = f"Tiny Shakespeare, 1,115,394 characters, from {SHAKESPEARE_URL}"


class Text(TextBuilder):
    """A file or folder of the user's own."""

    name = "text"
    DESCRIPTION = "UTF-8 text of the user's own"


def shakespeare(data: Mapping[str, Any]) -> TextBuilder:
    """The builder of tiny Shakespeare: first 90% train, last 10% validation by default."""
    path = fetch("shakespeare/input.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256)
    return _builder(Shakespeare, read_text(path), data["validation_fraction"])


def text(data: Mapping[str, Any]) -> TextBuilder:
    """The builder of `data.path`, a UTF-8 file or a folder searched for `.txt` files."""
    if not data["path"]:
        raise UserError("data.path is empty; name a file: --config.data.path=book.txt")
    return _builder(Text, read_text(Path(data["path"]).expanduser()), data["validation_fraction"])


def read_text(path: Path) -> str:
    """The text of a file, or of all `.txt` files below a folder in order of their names."""
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(f"data.path={path} has no .txt files below it")
        return "\n".join(read_text(file) for file in files)
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"data.path={path} does not exist") from None
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it with iconv") from None


def _builder(kind: type[TextBuilder], corpus: str, validation_fraction: float) -> TextBuilder:
    if not corpus:
        raise UserError("the corpus is empty: there is nothing to train on")
    num_train = int(len(corpus) * (1.0 - validation_fraction))

    def make_splits():
        train, validation = corpus[:num_train], corpus[num_train:]
        return {"train": kind.pieces(train), "validation": kind.pieces(validation)}

    settings = {
        "sha256": hashlib.sha256(corpus.encode("utf-8")).hexdigest(),
        "validation_fraction": validation_fraction,
    }
    return kind(settings, make_splits)
