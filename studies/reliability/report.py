"""The page docs/reliability.md: each part is a table of named rows with an explanation."""

import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from textwrap import TextWrapper
from typing import Any, NamedTuple

from studies.reliability.judge import SHORT
from studies.tables import table

PACKAGES = ("jax", "orbax-checkpoint", "numpy")
ALWAYS = ("traceback", "hang", "silent")  # columns that are shown even if empty
LISTED = 10  # failures listed per part

HEAD = """\
# Reliability

After this page you know what happens to a run that is killed, stopped, damaged, out of disk space
or divergent, and how that was tested.

A disturbed run is resumed and compared bit by bit with an undisturbed one. The runs last seconds
and save every third step, so most disturbances hit a save or an evaluation. They use the same
program as any training.

```bash
.venv/bin/python -m studies.reliability --part=all
```

writes this page. Each part below was run by the command under its table."""


class Part(NamedTuple):
    """A part of the study."""

    what: str  # title of the first column
    cases: int  # default number of cases
    run: Callable[[int, int, int], dict[str, Any]]  # (cases, seed, jobs) -> "rows" and "wrong"

    def said(self) -> tuple[str, list[str]]:
        """Return the title and the explanation of the table, from the docstring of `run`."""
        title, *paragraphs = (self.run.__doc__ or "").split("\n\n")
        return title.rstrip("."), [" ".join(paragraph.split()) for paragraph in paragraphs]


def about(part: str, cases: int, seed: int, seconds: float) -> dict[str, Any]:
    """Return the command, duration, versions and hardware of the figures of a part."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{package} {metadata.version(package)}" for package in PACKAGES]
    command = ["df", "--output=fstype", tempfile.gettempdir()]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    return {
        "command": f"python -m studies.reliability --part={part} --cases={cases} --seed={seed}",
        "seconds": round(seconds),
        "versions": ", ".join(versions),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), runs on {kind}",
    }


def page(found: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Part]) -> str:
    """Return the page: the text, table, failures and command of every part with figures."""
    text = TextWrapper(width=100, break_on_hyphens=False, break_long_words=False)
    lines = [HEAD]
    for name in [name for name in parts if name in found]:
        about, figures = found[name]["about"], found[name]["figures"]
        title, said = parts[name].said()
        lines += ["", f"## {title}"]
        for paragraph in filter(None, [*said, figures.get("skipped")]):
            lines += ["", *text.wrap(paragraph)]
        lines += [""]
        lines += [*table_of(parts[name].what, figures["rows"]), ""]
        if wrong := [f"- {_written(one)}" for one in figures["wrong"]]:
            lines += [f"Not as documented, {len(wrong)} in all:", "", *wrong[:LISTED], ""]
        made = "`{command}`: {seconds:,} seconds on {hardware}, {versions}."
        lines += text.wrap(made.format(**about))
    return "\n".join(lines) + "\n"


def _written(wrong: Any) -> str:
    """Describe a case that was not as documented."""
    if not isinstance(wrong, Mapping) or "hits" not in wrong:
        return f"`{str(wrong)[:SHORT]}`"
    what = "; ".join(f"`{' '.join(text.split())[:SHORT]}`" for text in wrong["wrong"])
    return f"{wrong['name']} ({', '.join(wrong['hits'])}): {what}"


def table_of(what: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table of named rows, without empty columns."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    filled = [c for c in columns if c in ALWAYS or any(row.get(c) for row in rows.values())]
    cells = [[name, *(row.get(column, "") for column in filled)] for name, row in rows.items()]
    return table([what, *filled], cells)
