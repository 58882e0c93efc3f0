"""Tables of the pages in docs/, and their raw results in results/."""

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
"""By the name of a number in records: its column title, and the format of its `spread` or a
function that formats its values."""
Tables = Mapping[str, list[str]]
"""Markdown lines of each table, by the name in its markers in the page."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def spread(values: Sequence[float | None], form: str = ".3f") -> str:
    """Format the mean and sample standard deviation over seeds, as `.3f` or `.1%`.

    Non-finite values are excluded, and the number of finite values is appended.
    """
    known = np.array(values, float)  # None becomes NaN
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
    """Return a table with a row for each list of records, one record per seed.

    A row begins with the name of its list. Columns that no record has are omitted; a cell without a
    value in its row holds `missing`.
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
    """Return the versions of Python and of packages, or "no NAME" if not installed."""
    known = {found.name: found.version for found in metadata.distributions()}
    of = lambda name: f"{name} {known[name]}" if name in known else f"no {name}"
    return ", ".join([f"Python {platform.python_version()}", *map(of, packages)])


def load(name: str) -> Any:
    """Load results/NAME.json; an empty dict if the file does not exist."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def dumped(found: Any, depth: int) -> str:
    """Return JSON with one line for each value that is `depth` containers deep: a record."""
    if not depth or not isinstance(found, dict | list):
        return json.dumps(found, allow_nan=False)
    if isinstance(found, list):
        return "[\n" + ",\n".join(dumped(value, depth - 1) for value in found) + "\n]"
    items = (f"{json.dumps(name)}: {dumped(value, depth - 1)}" for name, value in found.items())
    return "{\n" + ",\n".join(items) + "\n}"


def filled(text: str, tables: Tables) -> str:
    """Return the text of a page with the tables inserted between their markers.

    Raises:
      ValueError: the page has no markers for one of the tables.
    """
    for name, lines in tables.items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not end:
            raise ValueError(f"the page has no place for the table of {name}")
        text = "\n".join([before + begin, "", *lines, "", end + after])
    return text


def write(name: str, found: Any, tables: Callable[[Any], Tables], depth: int = 2) -> None:
    """Write results/NAME.json, one line per value `depth` containers deep, and the page of NAME."""
    disk.write_whole(RESULTS / f"{name}.json", (dumped(found, depth) + "\n").encode())
    write_page(name, tables(found))


def page_of(name: str) -> Path:
    """Return docs/results/NAME.md; for `results`, the paper's figures, docs/results/paper.md."""
    return PAGES / f"{'paper' if name == 'results' else name}.md"


def write_page(name: str, tables: Tables, to: Path | None = None) -> None:
    """Write the page of a study with these tables, in place or to another file."""
    page = page_of(name)
    (to or page).write_text(filled(page.read_text(), tables))
    print(f"written to {to or page}")
