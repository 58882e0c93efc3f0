"""Tables of the pages in docs/, and the raw results in results/ that they are made from."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nrgpt_jax import disk
from nrgpt_jax.cli import percent

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "results"
PAGES = DOCS / "results"
BEGIN, END = "<!-- table of {} -->", "<!-- end of the table of {} -->"

Record = dict[str, Any]
Columns = Mapping[str, tuple[str, str | Callable[[Sequence[Any]], str]]]
"""By the name of a number in records: the head of its column; the form of its `spread`, or how its
values are written."""
Tables = Mapping[str, list[str]]
"""Lines, by the name in the marks between which they stand in a page."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def spread(values: Sequence[float | None], form: str = ".3f") -> str:
    """Mean and standard deviation (of the sample) over seeds, in a form like `.3f` or `.1%`.

    Values that are not finite are left out, and how many are left is said.
    """
    known = np.array(values, float)  # None is not a number
    known = known[np.isfinite(known)]
    if not len(known):
        return "none"
    share = form.endswith("%")
    write = lambda x: percent(x, int(form[1:-1])) if share else f"{x:{form}}"
    text = write(known.mean())
    if len(known) > 1:
        text += f" ± {write(known.std(ddof=1))}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def summary(
    head: Sequence[str],
    found: Mapping[Any, Sequence[Record]],
    columns: Columns,
    missing: str = "none",
) -> list[str]:
    """A table with a row for each list of records, one record a seed.

    The first cells of a row are the name of its list; the others are those columns that some record
    has, or `missing` where none of this row has it.
    """
    known = {name for records in found.values() for record in records for name in record}
    shown = {name: column for name, column in columns.items() if name in known}

    def cell(records: Sequence[Record], name: str) -> str:
        values, form = [record.get(name) for record in records], shown[name][1]
        if not any(name in record for record in records):
            return missing
        return spread(values, form) if isinstance(form, str) else form(values)

    rows = [[*first, *(cell(own, name) for name in shown)] for first, own in found.items()]
    return table([*head, *(title for title, _ in shown.values())], rows)


def versions(*packages: str) -> str:
    """Python's, and those of packages, or that one is not installed."""
    known = {found.name: found.version for found in metadata.distributions()}
    of = lambda name: f"{name} {known[name]}" if name in known else f"no {name}"
    return ", ".join([f"Python {platform.python_version()}", *map(of, packages)])


def load(name: str) -> Any:
    """What results/NAME.json holds; nothing where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def dumped(found: Any, depth: int) -> str:
    """JSON in which what lies `depth` containers deep is one line each: a record."""
    if not depth or not isinstance(found, dict | list):
        return json.dumps(found, allow_nan=False)
    if isinstance(found, list):
        return "[\n" + ",\n".join(dumped(value, depth - 1) for value in found) + "\n]"
    items = (f"{json.dumps(name)}: {dumped(value, depth - 1)}" for name, value in found.items())
    return "{\n" + ",\n".join(items) + "\n}"


def filled(text: str, tables: Tables) -> str:
    """A page with the lines of tables between their marks.

    Raises:
      ValueError: it has no place for one of them.
    """
    for name, lines in tables.items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not end:
            raise ValueError(f"the page has no place for the table of {name}")
        text = "\n".join([before + begin, "", *lines, "", end + after])
    return text


def write(name: str, found: Any, tables: Callable[[Any], Tables], depth: int = 2) -> None:
    """Writes results/NAME.json, with a line for what lies `depth` deep, and the page of NAME."""
    disk.write_whole(RESULTS / f"{name}.json", (dumped(found, depth) + "\n").encode())
    write_page(name, tables(found))


def page_of(name: str) -> Path:
    """docs/results/NAME.md; of `results`, the figures of the paper, docs/results/paper.md."""
    return PAGES / f"{'paper' if name == 'results' else name}.md"


def write_page(name: str, tables: Tables, to: Path | None = None) -> None:
    """Writes the page of a study with these tables, or the same to another file."""
    page = page_of(name)
    (to or page).write_text(filled(page.read_text(), tables))
    print(f"written to {to or page}")
