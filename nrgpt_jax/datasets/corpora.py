"""Text corpora: their locations, their splits and their prepared tokens.

The data record of a run depends on these choices (names, checksums of corpora, the byte where a
text is split), so no library can make them.
"""

import contextlib
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nrgpt_jax.datasets import parts, shards
from nrgpt_jax.datasets.documents import (
    JSON_LINES,
    PARQUET,
    PLAIN,
    ROWS_OF_TEXT,
    Reader,
    read_articles,
    read_documents,
)
from nrgpt_jax.datasets.download import fetch
from nrgpt_jax.datasets.files import File, has_ending, is_remote, list_files
from nrgpt_jax.datasets.hf_tokenizer import PREFIX
from nrgpt_jax.datasets.pieces import LONGEST, Text
from nrgpt_jax.datasets.places import cache_root, digest
from nrgpt_jax.datasets.preparation import Plan, prepare
from nrgpt_jax.datasets.streams import Dataset, Stream
from nrgpt_jax.datasets.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    create_tokenizer,
    from_record,
)
from nrgpt_jax.errors import UserError

GENERATOR = 3  # increment when the same files give other tokens
WHOLE = 2**24  # a split of at most this many tokens is read into memory
COPY = "copy that folder again from where it was prepared"
ANY = (*JSON_LINES, *PARQUET, *PLAIN)
ARTICLES = (*PARQUET, *PLAIN)  # WikiText: one line of an article per line or row

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


CORPORA: Mapping[str, str] = {  # document corpora and their addresses
    "openwebtext": "hf://datasets/Skylion007/openwebtext",
    "wikitext": "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1",
    "c4": "hf://datasets/allenai/c4/en",
    "text": "",
}


def load(data: Mapping[str, Any]) -> Dataset:
    """Open the token streams of the corpus of `config.data`; prepare them on first use."""
    folder = prepare_corpus(data)
    # `data.path` may name a copy of a prepared folder, without the corpus to prepare it again.
    copied = bool(data["path"]) and folder == Path(data["path"]).expanduser()
    cure = COPY if copied else shards.REMAKE
    metadata = shards.read_metadata(folder, cure)
    try:
        tokenizer = from_record(metadata["tokenizer"])
    except ValueError as error:
        raise UserError(f"the metadata of {folder} is damaged ({error}); {cure}") from None
    if tokenizer.kind != kind_of(data["tokenizer"]):
        raise UserError(
            f"{folder} was prepared with --config.data.tokenizer={tokenizer.kind}; give the same"
        )

    def stream(split: str) -> Stream:
        records = shards.stream_of(metadata, split, COPY if copied else None)
        return Stream.of(records.tokens) if len(records) <= WHOLE else records

    return Dataset(stream("train"), stream("validation"), tokenizer, {}, metadata["fingerprint"])


def prepare_corpus(data: Mapping[str, Any], workers: int = 0) -> Path:
    """Return the folder of a corpus's prepared tokens; prepare them if they are missing.

    Args:
      data: `config.data`.
      workers: the number of local worker processes; 0: one per core.

    Raises:
      UserError: the corpus is missing or cannot be read, or `data.path` is empty.
    """
    if data["path"] and not is_remote(data["path"]):
        path = Path(data["path"]).expanduser()
        if shards.is_complete(path):
            return path
    place = _place(data)
    files = [] if is_remote(place) else _files(data, place)
    settings = {
        "generator": GENERATOR,
        "part_bytes": parts.PART_BYTES,
        "tokenizer": data["tokenizer"] + _content(data["tokenizer"]),
        "validation_fraction": data["validation_fraction"],
        "field": data["field"],
        # remote files are assumed not to change
        "files": [file[1:] for file in files] or place,
    }
    folder = cache_root() / data["name"] / digest(settings) / shards.VERSION
    prepare(folder, data["name"], lambda: _plan(data, files or _files(data, place)), workers)
    return folder


def kind_of(name: str) -> str:
    """Return the tokenizer kind of a `config.data.tokenizer`: `hf` for `hf:NAME`."""
    return name.partition(":")[0]


def _content(name: str) -> str:
    """Return the digest of a tokenizer file, whose content may change under the same name."""
    if name.startswith(PREFIX):
        with contextlib.suppress(OSError):
            content = Path(name.removeprefix(PREFIX)).read_bytes()
            return hashlib.sha256(content).hexdigest()[:12]
    return ""


def _place(data: Mapping[str, Any]) -> str:
    if data["name"] == "shakespeare":
        return str(fetch("shakespeare/input.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256))
    place = data["path"] or CORPORA[data["name"]]
    if not place:
        raise UserError("data.path is empty; name a file: --config.data.path=book.txt")
    return place


def _files(data: Mapping[str, Any], place: str) -> list[File]:
    """Return the files of a corpus; of a single text only its `.txt` files, if there are any.

    Raises:
      UserError: there are no files, or a file named directly has an unsupported ending.
    """
    known = ARTICLES if data["name"] == "wikitext" else ANY
    files = list_files(place, known)
    if _may_be_one_text(data):
        plain = [f for f in files if has_ending(f.name, (".txt",))]
        if plain or not any(has_ending(f.name, (*known, ".json")) for f in files):
            return plain or files  # a file named directly may have any ending
    for file in files:
        if not has_ending(file.name, known):
            raise UserError(
                f"{file.path} has none of the endings that are read ({', '.join(known)}); rename "
                "it, unpack it, or convert it"
            )
    return files


def _may_be_one_text(data: Mapping[str, Any]) -> bool:
    return data["name"] in ("shakespeare", "text") and data["tokenizer"] in ("char", "byte")


def _plan(data: Mapping[str, Any], files: list[File]) -> Plan:
    fraction, name, field = data["validation_fraction"], data["tokenizer"], data["field"]
    has_rows = any(has_ending(file.name, ROWS_OF_TEXT) for file in files)
    if _may_be_one_text(data) and not has_rows:
        return _text_plan(Text(files), name, fraction)
    reader = read_articles if data["name"] == "wikitext" else read_documents
    tokenizer = _characters(files, reader, field) if name == "char" else create_tokenizer(name)
    if len(files) == 1 and not has_rows and data["name"] in ("shakespeare", "text"):
        text = Text(files)
        return Plan(parts.text_parts(text, _boundary(text, fraction), ends=True), tokenizer)
    return Plan(parts.document_parts(files, reader, field, fraction), tokenizer, field=field)


def _characters(files: list[File], reader: Reader, field: str) -> Tokenizer:
    """Return a tokenizer of all characters of the documents and of the line end after each."""
    characters = {"\n"}
    for file in files:
        for document in reader(file, field, None):
            for piece in document.pieces or ():
                characters.update(piece)
    return CharTokenizer(characters)


def _boundary(text: Text, fraction: float) -> int:
    """Return the first byte of validation, which loses at most a tenth of its share to the cut."""
    at = max(1, int(text.size * (1.0 - fraction)))
    place, clean = text.place_to_cut(at, within=min((text.size - at) // 10, LONGEST))
    if not clean:
        why = "there is no blank or change of script near the boundary of training and validation"
        print(f"{why}: the text is cut between two characters, at byte {place:,}", file=sys.stderr)
    return place


def _text_plan(text: Text, tokenizer: str, fraction: float) -> Plan:
    """Plan one text, tokenized by characters or bytes; its last characters are for validation."""
    checksum, characters, count = hashlib.sha256(), set[str](), 0
    for piece in text.pieces(0, text.size):
        checksum.update(piece.encode("utf-8"))
        characters.update(piece)
        count += len(piece)
    left, boundary = int(count * (1.0 - fraction)), 0  # characters still to count, bytes counted
    for piece in text.pieces(0, text.size):
        boundary += len(piece[:left].encode("utf-8"))
        left -= min(left, len(piece))
        if not left:
            break
    created: Tokenizer = CharTokenizer(characters) if tokenizer == "char" else ByteTokenizer()
    fingerprint = digest({"sha256": checksum.hexdigest(), "validation_fraction": fraction})
    return Plan(parts.text_parts(text, boundary, ends=False), created, fingerprint)
