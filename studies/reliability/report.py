"""docs/reliability.md, from the figures in docs/reliability.json."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from textwrap import TextWrapper
from types import ModuleType
from typing import Any

from studies.reliability.judge import SHORT

PACKAGES = ("jax", "orbax-checkpoint", "numpy")
TOLD = 10  # things that went wrong, listed on the page

HEAD = """\
# What becomes of runs that are disturbed

Runs are killed, stopped, damaged and starved, and what is left of them is compared bit by bit with
a run that was left alone. The runs are tiny (seconds long, with a save every third step), so that
most disturbances hit something; what they exercise is the program as it is used.

```bash
.venv/bin/python -m studies.reliability --part=all
```

writes this page anew. The parts below were run one by one, each by the command under it.
"""


def about(part: str, cases: int, seed: int, seconds: float) -> dict[str, Any]:
    """How the figures of a part were made."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{package} {metadata.version(package)}" for package in PACKAGES]
    return {
        "command": f"python -m studies.reliability --part={part} --cases={cases} --seed={seed}",
        "seconds": round(seconds),
        "versions": ", ".join(versions),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {_file_system()}",
    }


def _file_system() -> str:
    """Of the folder of temporary files, where runs lie."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")).resolve()
    best = ("", "unknown")
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, place, kind, *_ = line.split()
        if folder.is_relative_to(place) and len(place) >= len(best[0]):
            best = place, kind
    return f"runs on {best[1]}"


def page(found: Mapping[str, Mapping[str, Any]], parts: Mapping[str, ModuleType]) -> str:
    """The page, of all parts that have figures."""
    lines = HEAD.splitlines()
    for name, module in parts.items():
        if name in found:
            lines += ["", f"## {module.TITLE}", "", *_section(found[name], module)]
    return "\n".join(lines) + "\n"


def _section(found: Mapping[str, Any], module: ModuleType) -> list[str]:
    made, figures = found["about"], found["figures"]
    wrong = told_wrong(figures)
    return [
        *wrapped(module.lines(figures)),
        "",
        *([f"Not as it should be, {len(wrong)} in all:", "", *wrong[:TOLD], ""] if wrong else []),
        *wrapped(
            [
                f"`{made['command']}`: {made['seconds']:,} seconds on {made['hardware']}, "
                f"{made['versions']}."
            ]
        ),
    ]


def wrapped(lines: Iterable[str]) -> list[str]:
    """Lines of text at most as long as those of code; tables as they are."""
    text = TextWrapper(width=100, break_on_hyphens=False, break_long_words=False)
    parts = ([line] if line.startswith("|") else text.wrap(line) or [""] for line in lines)
    return [line for part in parts for line in part]


def told_wrong(figures: Mapping[str, Any]) -> list[str]:
    """All that went wrong, a line each."""
    own = [f"- `{json.dumps(one)[:SHORT]}`" for one in figures.get("wrong", ())]
    groups = (told_wrong(group) for group in figures.values() if isinstance(group, Mapping))
    return own + [line for group in groups for line in group]
