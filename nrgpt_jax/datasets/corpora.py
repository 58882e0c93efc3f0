"""Corpora of text: where they lie, how they are split, and their prepared tokens."""

import contextlib
import hashlib
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nrgpt_jax.datasets import documents, parts, shards
from nrgpt_jax.datasets.documents import JSON_LINES, PARQUET, PLAIN, ROWS_OF_TEXT, Reader
from nrgpt_jax.datasets.download import fetch
from nrgpt_jax.datasets.files import File, has_ending, is_packed, is_remote, list_files
from nrgpt_jax.datasets.hf_tokenizer import PREFIX
from nrgpt_jax.datasets.pieces import LONGEST, Text
from nrgpt_jax.datasets.preparation import LOCAL, Engine, Plan, prepare
from nrgpt_jax.datasets.records import cache_root, digest
from nrgpt_jax.datasets.streams import RecordStream, Stream
from nrgpt_jax.datasets.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    create_tokenizer,
    from_record,
)
from nrgpt_jax.errors import UserError

GENERATOR = 3  # changes with what the code below makes of the same files
WHOLE = 2**24  # a split of at most this many tokens is read into memory
COPY = "copy that folder again from where it was prepared"
ANY = (*JSON_LINES, *PARQUET, *PLAIN)
ARTICLES = (*PARQUET, *PLAIN)  # of WikiText, line by line

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Corpus(NamedTuple):
    """A corpus of documents."""

    place: str  # where it is published; "": nowhere
    reader: Reader


CORPORA: Mapping[str, Corpus] = {
    "openwebtext": Corpus("hf://datasets/Skylion007/openwebtext", documents.read_documents),
    "wikitext": Corpus(
        "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1", documents.read_articles
    ),
    "c4": Corpus("hf://datasets/allenai/c4/en", documents.read_documents),
    "text": Corpus("", documents.read_documents),
}


class Prepared(NamedTuple):
    """The tokens of a corpus."""

    train: Stream
    validation: Stream
    tokenizer: Tokenizer
    fingerprint: str


def load(data: Mapping[str, Any]) -> Prepared:
    """Opens the tokens of the corpus that `config.data` describes, prepared before if need be."""
    folder = prepare_corpus(data, LOCAL)
    # What was named itself is a copy, perhaps without its corpus: it cannot be made here again.
    copied = bool(data["path"]) and folder == Path(data["path"]).expanduser()
    metadata = shards.read_metadata(folder, COPY) if copied else shards.read_metadata(folder)
    features = shards.features_of(metadata["dtype"])

    def stream(split: str) -> Stream:
        result = shards.shards_of(metadata, split)
        cure = COPY if copied else None
        records = RecordStream(result, metadata["record_tokens"], features, cure)
        return Stream.of(records.read(0, len(records))[0]) if len(records) <= WHOLE else records

    try:
        tokenizer = from_record(metadata["tokenizer"])
    except ValueError as error:
        cure = COPY if copied else shards.REMAKE
        raise UserError(f"the metadata of {folder} is damaged ({error}); {cure}") from None
    if tokenizer.kind != kind_of(data["tokenizer"]):
        raise UserError(
            f"{folder} was prepared with --config.data.tokenizer={tokenizer.kind}; give the same"
        )
    return Prepared(stream("train"), stream("validation"), tokenizer, metadata["fingerprint"])


def prepare_corpus(data: Mapping[str, Any], engine: Engine) -> Path:
    """The folder of the prepared tokens of a corpus, which are made if they are not there.

    Raises:
      UserError: the corpus is not there, or cannot be read; or `data.path` is missing.
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
        # what lies at an address is taken to stay as it is
        "files": [file[1:] for file in files] or place,
    }
    folder = cache_root() / data["name"] / digest(settings) / shards.VERSION

    def plan() -> Plan:
        return _plan(data, files or _files(data, place), place)

    prepare(folder, data["name"], plan, engine)
    return folder


def kind_of(name: str) -> str:
    """The kind of tokenizer that `config.data.tokenizer` names: of `hf:NAME` that is hf."""
    return name.partition(":")[0]


def _content(name: str) -> str:
    """The digest of a tokenizer's file, which may change under its name."""
    if not name.startswith(PREFIX):
        return ""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(name.removeprefix(PREFIX)).read_bytes()).hexdigest()[:12]
    return ""


def _place(data: Mapping[str, Any]) -> str:
    if data["name"] == "shakespeare":
        return str(fetch("shakespeare/input.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256))
    place = data["path"] or CORPORA[data["name"]].place
    if not place:
        raise UserError("data.path is empty; name a file: --config.data.path=book.txt")
    return place


def _files(data: Mapping[str, Any], place: str) -> list[File]:
    """The files of a corpus. Raises UserError where one that was named is not of a kind read."""
    one_text = _is_one_text(data, place)
    known = ARTICLES if data["name"] == "wikitext" else ANY
    files = list_files(place, (".txt",) if one_text else known)
    for file in files:
        is_data = has_ending(file.name, (*JSON_LINES, ".json", *PARQUET))
        if one_text and is_data:
            raise UserError(
                f"{file.path} is not plain text, which --config.data.tokenizer={data['tokenizer']} "
                f"needs; documents are read from {', '.join(ROWS_OF_TEXT)}"
            )
        if is_packed(file.name) and (one_text or not has_ending(file.name, known)):
            raise UserError(f"{file.path} is packed; unpack it first")
        if not one_text and not has_ending(file.name, known):
            raise UserError(
                f"{file.path} has none of the endings that are read ({', '.join(known)}); rename "
                "it, or convert it"
            )
    return files


def _is_one_text(data: Mapping[str, Any], place: str) -> bool:
    """Character and byte models read plain files as one long text; all else are documents."""
    plain = data["name"] in ("shakespeare", "text") and data["tokenizer"] in ("char", "byte")
    return plain and not _has_rows(place)


def _has_rows(place: str) -> bool:
    """Whether a file has a document a row, or a folder here such files and no plain ones."""
    folder = Path(place).expanduser()
    if is_remote(place) or not folder.is_dir():
        return has_ending(place, ROWS_OF_TEXT)
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    rows, plain = (any(has_ending(n, ends) for n in names) for ends in (ROWS_OF_TEXT, (".txt",)))
    return rows and not plain


def _characters(files: list[File], reader: Reader, field: str) -> Tokenizer:
    """The tokenizer of all characters of documents, and of the line end behind each."""
    characters = {"\n"}
    for file in files:
        for document in reader(file, field, None):
            for piece in document.pieces or ():
                characters.update(piece)
    return CharTokenizer(characters)


def _plan(data: Mapping[str, Any], files: list[File], place: str) -> Plan:
    fraction = data["validation_fraction"]
    if _is_one_text(data, place):
        return _text_plan(Text(files), data["tokenizer"], fraction)
    reader, field = CORPORA.get(data["name"], CORPORA["text"]).reader, data["field"]
    if data["tokenizer"] == "char":
        tokenizer = _characters(files, reader, field)
    else:
        tokenizer = create_tokenizer(data["tokenizer"])
    one = len(files) == 1 and not has_ending(files[0].name, ROWS_OF_TEXT)
    if one and data["name"] in ("shakespeare", "text"):
        text = Text(files)
        return Plan(parts.text_parts(text, _boundary(text, fraction), ends=True), tokenizer)
    return Plan(parts.document_parts(files, reader, field, fraction), tokenizer, field=field)


def _boundary(text: Text, fraction: float) -> int:
    """The byte where training ends and validation begins; at most a tenth of its share is lost."""
    at = max(1, int(text.size * (1.0 - fraction)))
    place, clean = text.place_to_cut(at, within=min((text.size - at) // 10, LONGEST))
    if not clean:
        why = "there is no blank or change of script near the boundary of training and validation"
        print(f"{why}: the text is cut between two characters, at byte {place:,}", file=sys.stderr)
    return place


def _text_plan(text: Text, tokenizer: str, fraction: float) -> Plan:
    """One text by characters or bytes: its last characters are for validation."""
    checksum, characters, lengths = hashlib.sha256(), set[str](), []
    for piece in text.pieces(0, text.size):
        encoded = piece.encode("utf-8")
        checksum.update(encoded)
        characters |= set(piece)
        lengths.append((len(encoded), len(piece)))
    num_train = int(sum(length for _, length in lengths) * (1.0 - fraction))
    boundary = _byte_of(text, lengths, num_train)
    created: Tokenizer = CharTokenizer(characters) if tokenizer == "char" else ByteTokenizer()
    fingerprint = digest({"sha256": checksum.hexdigest(), "validation_fraction": fraction})
    return Plan(parts.text_parts(text, boundary, ends=False), created, fingerprint)


def _byte_of(text: Text, lengths: list[tuple[int, int]], character: int) -> int:
    """The byte at which a character begins, of a text with pieces of these bytes and characters."""
    offsets = itertools.accumulate(lengths, lambda a, b: (a[0] + b[0], a[1] + b[1]), initial=(0, 0))
    for (at, before), (size, length) in zip(offsets, lengths, strict=False):
        if character < before + length:
            piece = "".join(text.pieces(at, at + size))
            return at + len(piece[: character - before].encode("utf-8"))
    return text.size
