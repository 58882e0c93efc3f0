"""What helps at equal parameters: trains, each with its own learning rate, writes docs/quality.md.

    python -m studies.quality [--runs=runs/quality] [--jobs=2] [--seeds=3]

Every variant of experiments/quality.py is trained with seed 0 at each of its learning rates; the
one with the lowest validation loss is taken, and trained with the seeds from 1 on, which are the
ones that the table shows. It goes between the marks in docs/quality.md, the numbers to
docs/quality.json.
"""

import itertools
import json
import math
from concurrent.futures import Executor, Future
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.metrics import read_metrics
from studies.runner import (
    ROOT,
    Directories,
    define_flags,
    failure,
    load,
    prepare,
    start,
    train_side_by_side,
    trainers,
)
from studies.tables import spread, table

EXPERIMENT, DOCS = ROOT / "experiments/quality.py", ROOT / "docs"
BEGIN, END = "<!-- table of {} -->", "<!-- end of the table of {} -->"
SIZES = ("small", "large")
REFERENCE = "GPT_Rec_parallel"


def tuned(pool: Executor, names: list[str], f: flags.FlagValues) -> dict[str, dict[str, Any]]:
    """Trains these variants; the learning rate of each, and its losses in nats a character."""
    experiment, runs, searches, found = load(EXPERIMENT), Path(f.runs), {}, {}
    cell = lambda name, rate: f"{name}@{rate:g}"
    if f.side_by_side:
        own = {name: _directories(experiment, name, f) for name in names}
        train_side_by_side(pool, EXPERIMENT, own)
    for name in names:
        rates = experiment.rates(name)
        searches[name] = {r: start(pool, EXPERIMENT, runs, cell(name, r), 0) for r in rates}
    repeats = {}
    for name, search in searches.items():
        searched = {r: loss(run, runs, cell(name, r), 0) for r, run in search.items()}
        best = min(searched, key=lambda r: searched[r])
        seeds = range(1, f.seeds + 1)
        repeats[name] = {s: start(pool, EXPERIMENT, runs, cell(name, best), s) for s in seeds}
        found[name] = {
            "parameters": experiment.parameters(experiment.get_config(name).model),
            "searched": {f"{rate:g}": seen for rate, seen in searched.items()},
            "learning_rate": best,
        }
    for name, row in found.items():
        cells = repeats[name].items()
        row["losses"] = [loss(run, runs, cell(name, row["learning_rate"]), s) for s, run in cells]
        print(name, row, flush=True)
    return found


def _directories(experiment: ModuleType, name: str, f: flags.FlagValues) -> Directories:
    """Of every seed and learning rate."""
    cells = itertools.product(range(f.seeds + 1), experiment.rates(name))
    return {(seed, r): Path(f.runs) / f"{name}@{r:g}" / str(seed) for seed, r in cells}


def loss(run: Future, runs: Path, variant: str, seed: int) -> float:
    """The validation loss after the last step; infinite where the training diverged."""
    error = failure(run, f"{variant}, seed {seed}")
    if isinstance(error, UserError):
        return math.inf
    if error is not None:
        raise error
    last = [r["val/loss"] for r in read_metrics(runs / variant / str(seed)) if "val/loss" in r][-1]
    return math.inf if last is None else last


def page(found: dict[str, dict[str, Any]], text: str) -> str:
    """docs/quality.md with the tables in their places."""
    for size in SIZES:
        rows = {n.removeprefix(size + "_"): r for n, r in found.items() if n.startswith(size)}
        means = {name: _mean(row["losses"]) for name, row in rows.items()}
        reference = means.get(REFERENCE + "_muon", math.nan)
        lines = [
            [
                f"`{name}`",
                f"{rows[name]['parameters']:,}",
                f"{rows[name]['learning_rate']:g}",
                spread(rows[name]["losses"], ".4f"),
                f"{mean - reference:+.3f}",
            ]
            for name, mean in sorted(means.items(), key=lambda named: named[1])
        ]
        head = ["variant", "parameters", "learning rate", "validation loss", "difference"]
        begin, end = BEGIN.format(size), END.format(size)
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = "\n".join([before + begin, "", *table(head, lines), "", end + after])
    return text


def _mean(losses: list[float | None]) -> float:
    """Infinite where a training has diverged (None in the file), or there is none."""
    return float(np.mean([math.inf if value is None else value for value in losses or [None]]))


def main(f: flags.FlagValues) -> None:
    """Trains and writes."""
    experiment, found = load(EXPERIMENT), dict[str, dict[str, Any]]()
    names = f.only or experiment.variants()
    prepare(map(experiment.get_config, names))
    with trainers(f.jobs) as pool:
        for size in SIZES:
            found |= tuned(pool, [name for name in names if name.startswith(size)], f)
    if not f.measure:
        return
    kept = DOCS / "quality.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    everything = {
        n: {**before, **found}[n] for n in experiment.variants() if n in {**before, **found}
    }
    text = page(everything, (DOCS / "quality.md").read_text())
    kept.write_text(json.dumps(plain(everything), indent=1) + "\n")
    (DOCS / "quality.md").write_text(text)
    print(f"written to {DOCS / 'quality.md'}")


if __name__ == "__main__":
    define_flags("runs/quality", seeds=3)
    cli.run(lambda: main(flags.FLAGS))
