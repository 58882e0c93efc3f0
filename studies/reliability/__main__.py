"""Disturbs runs, and writes what became of them: docs/reliability.md and docs/reliability.json.

    python -m studies.reliability --part=kills [--cases=100] [--jobs=2] [--out=FILE.json]

The figures of a part replace those that were there; the page beside the JSON is written anew.
"""

import argparse
import importlib
import json
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.errors import STOPPED
from studies.programs import ROOT
from studies.reliability import report

PARTS = ("kills", "stops", "damage", "disk", "divergence", "contents", "commands", "cost")


def modules() -> dict[str, ModuleType]:
    """Every part: `run(cases, seed, jobs)` gives figures, `lines(figures)` their place on the page,
    under `TITLE`; `CASES` is how many cases there are by default."""
    return {part: importlib.import_module(f"studies.reliability.{part}") for part in PARTS}


def given() -> argparse.Namespace:
    """The values of the flags, which are then gone: the programs that are tried define theirs."""
    values = {name: flags.FLAGS[name].value for name in ("part", "cases", "seed", "jobs", "out")}
    for name in values:
        delattr(flags.FLAGS, name)
    return argparse.Namespace(**values)


def main(f: argparse.Namespace) -> None:
    """Runs the parts that are asked for, one after another."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # leaves no disk mounted
    parts, out = modules(), Path(f.out)
    found = json.loads(out.read_text()) if out.exists() else {}
    for part in parts if f.part == "all" else [f.part]:
        cases = f.cases or parts[part].CASES
        begin = time.monotonic()
        figures = parts[part].run(cases, f.seed, f.jobs)
        about = report.about(part, cases, f.seed, time.monotonic() - begin)
        found[part] = {"about": about, "figures": figures}
        out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        out.with_suffix(".md").write_text(report.page(found, parts))
        print(f"{part}: {about['seconds']} s; written to {out} and the page beside it", flush=True)


if __name__ == "__main__":
    flags.DEFINE_enum("part", "all", ("all", *PARTS), "Which part.")
    flags.DEFINE_integer("cases", 0, "How many cases; 0: as many as the page has.", 0)
    flags.DEFINE_integer("seed", 0, "Of moments and places.")
    flags.DEFINE_integer("jobs", 2, "So many runs at a time.", 1)
    flags.DEFINE_string("out", str(ROOT / "docs/reliability.json"), "Where figures are kept.")
    cli.run(lambda: main(given()))
