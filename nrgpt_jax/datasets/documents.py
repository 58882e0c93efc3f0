"""Readers of documents: plain text, JSON lines, Parquet, and WikiText articles.

pyarrow and json parse the files. `datasets` reads these formats too, but it reports no byte or row
of a document, which decides its split, and gives no part of a file to one worker.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from nrgpt_jax.datasets.files import File, has_ending, opened
from nrgpt_jax.datasets.pieces import Text, cut_text
from nrgpt_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)
PLAIN = (".txt", ".raw", ".tokens")
ROWS_OF_TEXT = (*JSON_LINES, *PARQUET)
ROWS = 64  # of a Parquet file per read
WRONG_FIELD = 1000  # leading lines without the field, after which its name must be wrong


class Document(NamedTuple):
    """A document: its location, and its text in pieces."""

    name: str  # the name of its file within the corpus
    place: int  # its first byte, row or line in the file
    pieces: Iterator[str] | None  # None: it has no text
    ends: bool = True  # whether an end token follows it


Range = tuple[int, int] | None  # bytes of JSON lines, row groups of Parquet; None: all
Reader = Callable[[File, str, Range], Iterator[Document]]
Texts = Iterator[tuple[int, str | None]]
"""Pairs (place, text); the text is None for a document without one."""


def read_documents(file: File, field: str, within: Range = None) -> Iterator[Document]:
    """Yield the documents of a file: a whole plain text, a JSON line, or a Parquet row.

    Args:
      file: the file to read.
      field: the name of the text field in JSON lines and Parquet.
      within: the range in which the documents begin.

    Raises:
      UserError: the file cannot be read, is truncated, or has no such field.
    """
    if not has_ending(file.name, ROWS_OF_TEXT):
        text = Text([file])
        yield Document(file.name, 0, text.pieces(0, text.size))
        return
    read = _json_lines if has_ending(file.name, JSON_LINES) else _rows
    for place, row in read(file, field, within):
        yield Document(file.name, place, None if row is None else cut_text(row))


def read_articles(file: File, field: str, within: Range = None) -> Iterator[Document]:
    """Yield the articles of a WikiText file: plain text, or Parquet with a line in each row.

    An article begins with a line ` = Title = ` after an empty line. Blank lines before the first
    title belong to the first article.
    """
    del within
    lines = _rows(file, field, None) if has_ending(file.name, PARQUET) else _lines(file)
    article: list[str] = []
    begin, blank = 0, True
    for place, line in lines:
        if line is None:
            continue
        if blank and _is_title(line) and any(part.strip() for part in article):
            yield Document(file.name, begin, cut_text("".join(article)))
            article, begin = [], place
        article.append(line)
        blank = not line.strip()
    if article:
        yield Document(file.name, begin, cut_text("".join(article)))


def _is_title(line: str) -> bool:
    line = line.strip()
    inside = line[2:-2]
    one = line.startswith("= ") and line.endswith(" =") and len(line) > 4
    return one and not inside.startswith("= ") and not inside.endswith(" =")


def _lines(file: File) -> Texts:
    with opened(file.path) as data:
        try:
            yield from enumerate(io.TextIOWrapper(data, "utf-8-sig", newline="\n"))
        except UnicodeDecodeError as error:
            cure = "convert it with iconv"
            raise UserError(f"{file.path} is not UTF-8 ({error}); {cure}") from None


def _json_lines(file: File, field: str, within: Range) -> Texts:
    begin, end = within or (0, None)
    observed = lacking = 0
    from_start = begin == 0
    with opened(file.path, "infer") as lines:
        if begin:  # skip the line of byte begin - 1, which begins before the range
            lines.seek(begin - 1)
            begin += len(lines.readline()) - 1
        while (end is None or begin < end) and (line := lines.readline()):
            if line.strip():
                document = _document_of_line(line, f"{file.path}, byte {begin}")
                observed, lacking = observed + 1, lacking + (field not in document)
                if from_start and lacking == observed == WRONG_FIELD:
                    raise UserError(f"the first {observed:,} lines of {file.path} {no_text(field)}")
                text = document.get(field)
                yield begin, _repaired(text) if isinstance(text, str) else None
            begin += len(line)


def _document_of_line(line: bytes, where: str) -> Mapping[str, object]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the line is not JSON ({error})") from None
    return document if isinstance(document, Mapping) else {}


def no_text(field: str) -> str:
    """Return the end of an error message about documents that lack the text field."""
    return f"have no text {field!r}; name their field: --config.data.field=..."


def _repaired(text: str) -> str:
    """Replace each lone surrogate, which is not a character, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _rows(file: File, field: str, within: Range) -> Texts:
    with opened_parquet(file) as parquet:
        names = parquet.schema_arrow.names
        if field not in names:
            known = f"has no column {field!r} but {', '.join(names)}"
            raise UserError(f"{file.path} {known}; name one: --config.data.field=...")
        first, end = within or (0, parquet.num_row_groups)
        row = sum(parquet.metadata.row_group(g).num_rows for g in range(first))
        for batch in parquet.iter_batches(ROWS, list(range(first, end)), [field]):
            for text in batch.column(0).to_pylist():
                yield row, text if isinstance(text, str) else None
                row += 1


@contextlib.contextmanager
def opened_parquet(file: File) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """Open a Parquet file. Raises UserError if it is invalid, damaged, or holds bytes for text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(file.path) as data:
        try:
            yield pq.ParquetFile(data, pre_buffer=False, buffer_size=2**20)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            what = "is no whole Parquet file with UTF-8 text"
            raise UserError(f"{file.path} {what} ({reason}); fetch it again") from None


def row_group_sizes(file: File) -> list[int]:
    """Return the compressed size in bytes of each row group of a Parquet file."""
    with opened_parquet(file) as parquet:
        groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
        return [
            sum(group.column(c).total_compressed_size for c in range(group.num_columns))
            for group in groups
        ]
