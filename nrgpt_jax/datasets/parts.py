"""Parts of a corpus: units of work that one worker turns into one shard of each split.

A resumed preparation keeps finished parts, and workers share them, so a corpus is cut here by bytes
and row groups; neither TFDS nor pyarrow has a resumable unit of work.
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from nrgpt_jax.datasets.documents import (
    PARQUET,
    ROWS_OF_TEXT,
    Document,
    Range,
    Reader,
    read_documents,
    row_group_sizes,
)
from nrgpt_jax.datasets.files import File, has_ending
from nrgpt_jax.datasets.pieces import Text
from nrgpt_jax.errors import UserError

PART_BYTES = 2**26  # bytes of a corpus, as stored (compressed), per part
PART_FILES = 10_000
COUNTED = 2**24  # bytes of the largest corpus whose documents are counted before drawing splits
_DRAWS = 2.0**64
SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
BOTH = ("train", "validation")


class Part(NamedTuple):
    """The documents of some files, or of a range of one file."""

    size: int  # bytes
    splits: tuple[str, ...]  # of its documents
    documents: Callable[[], Iterator[tuple[str, Document]]]  # in order, each with its split
    identity: list[Any]  # everything its tokens depend on, except the tokenizer


def drawn_split(document: Document, validation_fraction: float) -> str:
    """Draw the split of a document as a function of its location in the corpus alone.

    The file's name within the corpus and the document's place in the file are hashed, so the split
    depends neither on how the corpus is cut into parts nor on where it is stored.
    """
    return "validation" if _hash(document) < validation_fraction * _DRAWS else "train"


def _hash(document: Document) -> int:
    key = f"{document.name}:{document.place}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())


def _fraction_for_both(
    files: Sequence[File], reader: Reader, field: str, validation_fraction: float
) -> float:
    """Return the validation fraction, adjusted if a split of few documents would be empty.

    Documents are counted only where this is fast: in small corpora, and in files of plain text,
    which are one document each.
    """
    plain = reader is read_documents and not any(has_ending(f.name, ROWS_OF_TEXT) for f in files)
    if not plain and sum(file.size for file in files) > COUNTED:
        return validation_fraction
    documents: Iterable[Document] = (Document(file.name, 0, iter(())) for file in files)
    if not plain:
        documents = itertools.chain(*(reader(file, field, None) for file in files))
    draws = sorted(_hash(document) for document in documents if document.pieces is not None)
    count = len(draws)
    drawn = sum(value < validation_fraction * _DRAWS for value in draws)
    if count == 0 or 0 < drawn < count:
        return validation_fraction
    if count == 1:
        print(
            "the corpus is one document, which is for training; give more documents, or a .txt "
            "file with --config.data.name=text, which is split by its place",
            file=sys.stderr,
        )
        return 0.0
    num_validation = 1 if drawn == 0 else count - 1
    few = f"there are only {count} documents, and {num_validation} of them are drawn for validation"
    print(few, file=sys.stderr)
    return (draws[num_validation - 1] + draws[num_validation]) / 2 / _DRAWS


def text_parts(text: Text, boundary: int, ends: bool) -> list[Part]:
    """Cut one text into parts, for training up to a byte and for validation from there on.

    Args:
      text: the whole text.
      boundary: the first byte of validation.
      ends: whether an end token follows the text.
    """
    names = [file[1:] for file in text.files]
    parts: list[Part] = []
    for split, start, stop in (("train", 0, boundary), ("validation", boundary, text.size)):
        while start < stop:
            end = min(stop, text.place_to_cut(start + PART_BYTES).place)
            about = (start, end, split, ends and end == text.size)
            documents = partial(_documents_of_text, text, *about)
            parts.append(Part(end - start, (split,), documents, [names, *about]))
            start = end
    return parts


def _documents_of_text(
    text: Text, start: int, stop: int, split: str, ends: bool
) -> Iterator[tuple[str, Document]]:
    yield split, Document("", start, text.pieces(start, stop), ends)


def document_parts(
    files: Sequence[File], reader: Reader, field: str, validation_fraction: float
) -> list[Part]:
    """Divide files of documents into parts, in order.

    Raises:
      UserError: no file is for training.
    """
    splits = _splits_of(files)
    parts: list[Part] = []
    for split in (None, *dict.fromkeys(SPLITS.values())):
        chosen = [f for f, s in zip(files, splits, strict=True) if s == split]
        fraction = validation_fraction
        if split is None and chosen:
            fraction = _fraction_for_both(chosen, reader, field, validation_fraction)
        for group, within, size in _runs(chosen):
            about = (within, split, field, fraction)
            documents = partial(_documents_of_files, reader, group, *about)
            names = [file[1:] for file in group]
            parts.append(Part(size, (split,) if split else BOTH, documents, [names, *about]))
    return parts


def _documents_of_files(
    reader: Reader,
    files: Sequence[File],
    within: Range,
    split: str | None,
    field: str,
    validation_fraction: float,
) -> Iterator[tuple[str, Document]]:
    for file in files:
        for document in reader(file, field, within):
            yield split or drawn_split(document, validation_fraction), document


def _splits_of(files: Sequence[File]) -> list[str | None]:
    """Return the split of each file; None: its documents are drawn for training or validation.

    The splits in file names are used if every file has one and one is validation; otherwise
    documents are drawn, and the reason is printed. Files named for testing are never drawn.
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
    """Return the split in a file's name, or else in the name of the nearest folder with one.

    Examples: train.txt, wiki.valid.raw, c4-train.00000.json.gz, test/00000.jsonl.
    """
    levels = reversed(name.lower().split("/"))
    words = itertools.chain(*(re.split(r"[^a-z]+", level) for level in levels))
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _runs(files: Sequence[File]) -> Iterator[tuple[Sequence[File], Range, int]]:
    """Group small files and cut large ones: yield the files, range and size of each part."""
    for is_large, run in itertools.groupby(files, lambda file: file.size > PART_BYTES):
        group = list(run)
        if is_large:
            for file in group:
                for within, size in _ranges(file):
                    yield [file], within, size
        else:
            for (first, end), size in _grouped([file.size for file in group]):
                yield group[first:end], None, size


def _ranges(file: File) -> list[tuple[Range, int]]:
    if has_ending(file.name, PARQUET):
        return [*_grouped(row_group_sizes(file))]
    if has_ending(file.name, (".jsonl",)):
        starts = range(0, file.size, PART_BYTES)
        return [((at, end := min(at + PART_BYTES, file.size)), end - at) for at in starts]
    return [(None, file.size)]


def _grouped(sizes: Sequence[int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Group neighbours (files, row groups) to about PART_BYTES: yield ((first, end), size)."""
    first = total = 0
    for end, size in enumerate(sizes, 1):
        total += size
        if total >= PART_BYTES or end - first >= PART_FILES or end == len(sizes):
            yield (first, end), total
            first, total = end, 0
