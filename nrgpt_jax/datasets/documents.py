"""Documents of files: plain text, JSON lines, Parquet, and the articles of WikiText."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from nrgpt_jax.datasets.files import File, opened
from nrgpt_jax.datasets.pieces import Text, cut_text
from nrgpt_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)
PLAIN = (".txt", ".raw", ".tokens")
ROWS = 64  # of a Parquet file, read at once


class Document(NamedTuple):
    """A document: where it stands, and its text in pieces."""

    name: str  # of its file, within the corpus
    place: int  # its first byte, row or line in the file
    pieces: Iterator[str]
    ends: bool = True  # whether an end follows it


Range = tuple[int, int] | None  # bytes of JSON lines, row groups of Parquet; None: all


def read_documents(file: File, field: str, within: Range = None) -> Iterator[Document]:
    """The documents of a file: the whole of a text, a line of JSON lines, a row of Parquet.

    Args:
      file: what to read.
      field: the name of the text in JSON lines and Parquet.
      within: only those that begin in this range.

    Raises:
      UserError: the file cannot be read, is cut short, or a document in it has no text.
    """
    if file.name.endswith(JSON_LINES):
        texts = _json_lines(file, field, within)
    elif file.name.endswith(PARQUET):
        texts = _rows(file, field, within)
    else:
        text = Text([file])
        return iter((Document(file.name, 0, text.pieces(0, text.size)),))
    return (Document(file.name, place, cut_text(text)) for place, text in texts)


def read_articles(file: File, field: str, within: Range = None) -> Iterator[Document]:
    """The articles of a WikiText file of plain text, or of Parquet with a line in each row.

    An article begins with a line ` = Title = ` after an empty one. What stands before the first
    belongs to it.
    """
    del within
    lines = _rows(file, field, None) if file.name.endswith(PARQUET) else _lines(file)
    article: list[str] = []
    begin, blank = 0, True
    for place, line in lines:
        if blank and _is_title(line) and any(part.strip() for part in article):
            yield Document(file.name, begin, cut_text("".join(article)))
            article, begin = [], place
        article.append(line)
        blank = not line.strip()
    if article:
        yield Document(file.name, begin, cut_text("".join(article)))


Reader = Callable[[File, str, Range], Iterator[Document]]


def _is_title(line: str) -> bool:
    line = line.strip()
    inside = line[2:-2]
    one = line.startswith("= ") and line.endswith(" =") and len(line) > 4
    return one and not inside.startswith("= ") and not inside.endswith(" =")


def _lines(file: File) -> Iterator[tuple[int, str]]:
    with opened(file.path) as lines:
        for number, line in enumerate(lines):
            yield number, _decoded(line, file.path)


def _decoded(line: bytes, path: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it with iconv") from None


def _json_lines(file: File, field: str, within: Range) -> Iterator[tuple[int, str]]:
    begin, end = within or (0, None)
    with opened(file.path) as lines:
        if begin:  # the line that byte begin - 1 belongs to begins before the range
            lines.seek(begin - 1)
            begin += len(lines.readline()) - 1
        while end is None or begin < end:
            if not (line := lines.readline()):
                return
            if line.strip():
                yield begin, _text_of_line(line, field, f"{file.path}, byte {begin}")
            begin += len(line)


def _text_of_line(line: bytes, field: str, where: str) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the line is not JSON ({error})") from None
    text = document.get(field) if isinstance(document, Mapping) else None
    return _repaired(_checked(text, field, where))


def _repaired(text: str) -> str:
    """The text, with a mark for each half of a surrogate pair: that is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _checked(text: object, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(
            f"{where}: the document has no text {field!r}; name its field: --config.data.field=..."
        )
    return text


def _rows(file: File, field: str, within: Range) -> Iterator[tuple[int, str]]:
    with opened_parquet(file) as parquet:
        if field not in parquet.schema_arrow.names:
            names = ", ".join(parquet.schema_arrow.names)
            raise UserError(
                f"{file.path} has no column {field!r} but {names}; name one: "
                "--config.data.field=..."
            )
        first, end = within or (0, parquet.num_row_groups)
        row = sum(parquet.metadata.row_group(g).num_rows for g in range(first))
        for batch in parquet.iter_batches(ROWS, list(range(first, end)), [field]):
            for text in batch.column(0).to_pylist():
                yield row, _checked(text, field, f"{file.path}, row {row}")
                row += 1


@contextlib.contextmanager
def opened_parquet(file: File) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """A Parquet file. Raises UserError when it is none, is damaged, or holds bytes for text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(file.path) as data:
        try:
            yield pq.ParquetFile(data, pre_buffer=False, buffer_size=2**20)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file.path} is no whole Parquet file ({reason})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file.path} is not UTF-8 ({error})") from None
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file.path} is damaged ({reason}); fetch it again") from None


def row_group_sizes(file: File) -> list[int]:
    """Bytes of each row group of a Parquet file, packed."""
    with opened_parquet(file) as parquet:
        groups = range(parquet.num_row_groups)
        return [_packed_size(parquet.metadata.row_group(g)) for g in groups]


def _packed_size(group) -> int:
    return sum(group.column(c).total_compressed_size for c in range(group.num_columns))
