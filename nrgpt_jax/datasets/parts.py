"""Parts of a corpus: what one worker turns into one shard of each split."""

import functools
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from nrgpt_jax.datasets.documents import (
    JSON_LINES,
    PARQUET,
    ROWS_OF_TEXT,
    Document,
    Range,
    Reader,
    read_documents,
    row_group_sizes,
)
from nrgpt_jax.datasets.files import File, has_ending, is_packed
from nrgpt_jax.datasets.pieces import Text
from nrgpt_jax.errors import UserError

PART_BYTES = 2**26  # of a corpus, packed as it lies there, in one part
PART_FILES = 10_000
COUNTED = 2**24  # bytes of a corpus whose documents are counted before they are drawn
_DRAWS = 2.0**64
SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
BOTH = ("train", "validation")


class DocumentsPart(NamedTuple):
    """Documents of some files, or of a range of one."""

    files: tuple[File, ...]
    within: Range
    size: int  # bytes
    split: str | None  # None: each document is drawn for training or validation
    reader: Reader
    field: str
    validation_fraction: float

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it feeds."""
        return BOTH if self.split is None else (self.split,)

    @property
    def identity(self) -> list[Any]:
        """What its tokens depend on, but for the tokenizer."""
        names = [file[1:] for file in self.files]
        return [names, self.within, self.split, self.field, self.validation_fraction]

    def documents(self) -> Iterator[tuple[str, Document]]:
        """The documents in order, each with its split."""
        for file in self.files:
            for document in self.reader(file, self.field, self.within):
                yield self.split or drawn_split(document, self.validation_fraction), document


class TextPart(NamedTuple):
    """A range of bytes of one text."""

    text: Text
    start: int
    stop: int
    split: str
    ends: bool  # whether the text ends in it, and with a token for that

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    @property
    def splits(self) -> tuple[str, ...]:
        """The split that it feeds."""
        return (self.split,)

    @property
    def identity(self) -> list[Any]:
        """What its tokens depend on, but for the tokenizer."""
        files, begin = self.text.files_of(self.start, self.stop)
        return [[file[1:] for file in files], begin, self.start, self.stop, self.split, self.ends]

    def documents(self) -> Iterator[tuple[str, Document]]:
        """The text in pieces."""
        pieces = self.text.pieces(self.start, self.stop)
        yield self.split, Document("", self.start, pieces, self.ends)


Part = DocumentsPart | TextPart


def drawn_split(document: Document, validation_fraction: float) -> str:
    """Validation for a share of all documents, decided by where a document stands and nothing else.

    The file's name within the corpus and the document's place in the file are hashed, so that it
    does not matter how the corpus is cut into parts, or where it lies.
    """
    return "validation" if _hash(document) < validation_fraction * _DRAWS else "train"


def _hash(document: Document) -> int:
    key = f"{document.name}:{document.place}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())


def _fraction_for_both(
    files: Sequence[File], reader: Reader, field: str, validation_fraction: float
) -> float:
    """The fraction; where documents are few, one that leaves none of both splits empty.

    Documents are counted where that takes no long reading: in small corpora, and in files of
    plain text, which are a document each.
    """
    plain = reader is read_documents and not any(has_ending(f.name, ROWS_OF_TEXT) for f in files)
    if plain:
        draws = sorted(_hash(Document(file.name, 0, None)) for file in files)
    elif sum(file.size for file in files) <= COUNTED:
        documents = (document for file in files for document in reader(file, field, None))
        draws = sorted(_hash(document) for document in documents if document.pieces is not None)
    else:
        return validation_fraction
    count = len(draws)
    drawn = sum(value < validation_fraction * _DRAWS for value in draws)
    if count == 1:
        one = (
            "the corpus is one document, which is for training; give more documents, or a .txt file"
        )
        print(f"{one} with --config.data.name=text, which is split by its place", file=sys.stderr)
        return 0.0
    if count == 0 or 0 < drawn < count:
        return validation_fraction
    num_validation = 1 if drawn == 0 else count - 1
    few = f"there are only {count} documents, and {num_validation} of them are drawn for validation"
    print(few, file=sys.stderr)
    return (draws[num_validation - 1] + draws[num_validation]) / 2 / _DRAWS


def text_parts(text: Text, boundary: int, ends: bool) -> list[Part]:
    """One text, up to a byte for training and from there on for validation."""
    parts: list[Part] = []
    for split, start, stop in (("train", 0, boundary), ("validation", boundary, text.size)):
        while start < stop:
            end = min(stop, text.place_to_cut(start + PART_BYTES).place)
            parts.append(TextPart(text, start, end, split, ends and end == text.size))
            start = end
    return parts


def document_parts(
    files: Sequence[File], reader: Reader, field: str, validation_fraction: float
) -> list[Part]:
    """Files of documents, in order.

    Raises:
      UserError: no file is for training.
    """
    splits = _splits_of(files)
    order = [split for split in (None, *dict.fromkeys(SPLITS.values())) if split in splits]
    parts: list[Part] = []
    fraction = validation_fraction
    for split in order:
        chosen = [f for f, s in zip(files, splits, strict=True) if s == split]
        if split is None:
            fraction = _fraction_for_both(chosen, reader, field, validation_fraction)
        extra = functools.partial(
            DocumentsPart,
            split=split,
            reader=reader,
            field=field,
            validation_fraction=fraction,
        )
        parts += [extra(*run) for run in _runs(chosen)]
    return parts


def _splits_of(files: Sequence[File]) -> list[str | None]:
    """The split of each file; None: its documents are drawn for training or validation.

    Files that are named by their split keep it; where not all are, or none is for validation, they
    are drawn, and the reason is reported. A file that is named for testing never is.
    """
    named = [own_split(file.name) for file in files]
    local = None not in named and "validation" in named
    splits = named if local else [split if split == "test" else None for split in named]
    if not {None, "train"} & set(splits):
        raise UserError(
            "the corpus has files for validation or testing and none for training; name one "
            "train, such as train.txt"
        )
    if not local and any(named):
        nameless = next((f.name for f, s in zip(files, named, strict=True) if s is None), "")
        because = f"{nameless} names no split" if nameless else "no file is named for validation"
        but = ", but for files named test, which are left out" if "test" in splits else ""
        print(f"{because}: each document is drawn for training or validation{but}", file=sys.stderr)
    return splits


def own_split(name: str) -> str | None:
    """The split that a file's name names, or else the nearest folder that names one.

    Such as train.txt, wiki.valid.raw, c4-train.00000.json.gz, test/00000.jsonl.
    """
    words = (
        word for part in reversed(name.lower().split("/")) for word in re.split(r"[^a-z]+", part)
    )
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _runs(files: Iterable[File]) -> Iterator[tuple[tuple[File, ...], Range, int]]:
    """Small files together, large ones in ranges: files, range and size of each part."""
    small: list[File] = []
    for file in files:
        if file.size <= PART_BYTES:
            small.append(file)
        if small and (file.size > PART_BYTES or _is_enough(small)):
            yield tuple(small), None, sum(f.size for f in small)
            small = []
        if file.size > PART_BYTES:
            for within, size in _ranges(file):
                yield (file,), within, size
    if small:
        yield tuple(small), None, sum(f.size for f in small)


def _is_enough(files: list[File]) -> bool:
    return len(files) >= PART_FILES or sum(file.size for file in files) >= PART_BYTES


def _ranges(file: File) -> list[tuple[Range, int]]:
    if has_ending(file.name, PARQUET):
        return _grouped(row_group_sizes(file))
    if has_ending(file.name, JSON_LINES) and not is_packed(file.name):
        starts = range(0, file.size, PART_BYTES)
        return [((at, end := min(at + PART_BYTES, file.size)), end - at) for at in starts]
    return [(None, file.size)]


def _grouped(sizes: list[int]) -> list[tuple[Range, int]]:
    """Neighbouring row groups of about PART_BYTES together."""
    result: list[tuple[Range, int]] = []
    first = total = 0
    for group, size in enumerate(sizes, 1):
        total += size
        if total >= PART_BYTES or group == len(sizes):
            result.append(((first, group), total))
            first, total = group, 0
    return result
