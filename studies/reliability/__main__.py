"""Disturb runs and judge them: docs/reliability.md and results/reliability.json.

    python -m studies.reliability --part=kills [--cases=100] [--jobs=2] [--out=FILE.json]

New figures of a part replace its old ones. With --out, the page is written beside FILE.json.
"""

import json
import signal
import sys
import time
from pathlib import Path

from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.errors import STOPPED
from studies.programs import ROOT
from studies.reliability import commands, contents, cost, damage, disk, divergence, report, signals

PARTS = {
    "kills": signals.KILLS,
    "stops": signals.STOPS,
    "damage": damage.PART,
    "disk": disk.PART,
    "divergence": divergence.PART,
    "contents": contents.PART,
    "commands": commands.PART,
    "cost": cost.PART,
}
FIGURES, PAGE = ROOT / "results/reliability.json", ROOT / "docs/reliability.md"


def main(part: str, cases: int, seed: int, jobs: int, out: str) -> None:
    """Run the selected parts in order."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # exits cleanly, unmounting disks
    kept, page = (Path(out), Path(out).with_suffix(".md")) if out else (FIGURES, PAGE)
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in PARTS if part == "all" else [part]:
        count, begin = cases or PARTS[name].cases, time.monotonic()
        figures = PARTS[name].run(count, seed, jobs)
        about = report.about(name, count, seed, time.monotonic() - begin)
        found[name] = {"about": about, "figures": figures}
        kept.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        page.write_text(report.page(found, PARTS))
        print(f"{name}: {about['seconds']} s; written to {kept} and {page}", flush=True)


def given() -> dict:
    """Return and delete the flags: the programs under test define flags of the same names."""
    values = {name: flags.FLAGS[name].value for name in ("part", "cases", "seed", "jobs", "out")}
    for name in values:
        delattr(flags.FLAGS, name)
    return values


if __name__ == "__main__":
    flags.DEFINE_enum("part", "all", ("all", *PARTS), "Which part.")
    flags.DEFINE_integer("cases", 0, "How many cases; 0: as many as the page has.", 0)
    flags.DEFINE_integer("seed", 0, "Of moments and places.")
    flags.DEFINE_integer("jobs", 2, "Run N at a time.", 1)
    flags.DEFINE_string("out", "", "A JSON file for the figures, instead of the page's.")
    cli.run(lambda: main(**given()))
