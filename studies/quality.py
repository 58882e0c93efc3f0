"""What helps at equal parameters: trains, each with its own learning rate, writes docs/quality.md.

    python -m studies.quality [--runs=runs/quality] [--jobs=2] [--seeds=3]

Every variant of experiments/quality.py is trained with seed 0 at each of its learning rates; the
one with the lowest validation loss is taken, and trained with the seeds from 1 on, which are the
ones that the table shows. It goes between the marks in docs/quality.md, the numbers to
docs/quality.json.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.sweeps.loading import load_module
from nrgpt_jax.sweeps.progress import failure_of, is_done
from nrgpt_jax.training.divergence import RunDiverged
from studies.runner import ROOT, define_flags, train_possible
from studies.tables import spread, table

EXPERIMENT, DOCS = ROOT / "experiments/quality.py", ROOT / "docs"
BEGIN, END = "<!-- table of {} -->", "<!-- end of the table of {} -->"
SIZES = ("small", "large")
REFERENCE = "GPT_Rec_parallel"


def tuned(names: list[str], f: flags.FlagValues) -> dict[str, dict[str, Any]]:
    """Trains these variants; the learning rate of each, and its losses in nats a character."""
    experiment, runs = load_module(EXPERIMENT), Path(f.runs)
    cell = lambda name, rate: f"{name}@{rate:g}"
    searched = [cell(name, rate) for name in names for rate in experiment.rates(name)]
    # Side by side the other seeds of every learning rate cost little more.
    train([(c, s) for c in searched for s in range(f.seeds + 1 if f.side_by_side else 1)], f)
    found = {}
    for name in names:
        seen = {rate: loss(runs / cell(name, rate) / "0") for rate in experiment.rates(name)}
        found[name] = {
            "parameters": experiment.parameters(experiment.get_config(name).model),
            "searched": {f"{rate:g}": found for rate, found in seen.items()},
            "learning_rate": min(seen, key=lambda rate: seen[rate]),
        }
    seeds = range(1, f.seeds + 1)
    best = {name: cell(name, row["learning_rate"]) for name, row in found.items()}
    train([(c, seed) for c in best.values() for seed in seeds], f)
    for name, row in found.items():
        row["losses"] = [loss(runs / best[name] / str(seed)) for seed in seeds]
    return found


def train(cells: list[tuple[str, int]], f: flags.FlagValues) -> None:
    """Trains variants with seeds; that one diverges is a result.

    Raises:
      UserError: one has failed otherwise.
    """
    experiment, configs = load_module(EXPERIMENT), {}
    for variant, seed in cells:
        workdir = Path(f.runs) / variant / str(seed)
        configs[workdir] = experiment.get_config(variant)
        configs[workdir].seed = seed
    for workdir, why in train_possible(configs, f).items():
        if not why.startswith(RunDiverged.__name__):
            raise UserError(f"{workdir}: {why}; its log is there; --retry trains it again")


def loss(workdir: Path) -> float:
    """The validation loss after the last step; infinite where the training diverged.

    Raises:
      UserError: it was neither trained to the end nor has it diverged.
    """
    if is_done(workdir):
        last = [line["val/loss"] for line in read_metrics(workdir) if "val/loss" in line][-1]
        return math.inf if last is None else last
    if failure_of(workdir).startswith(RunDiverged.__name__):
        return math.inf
    raise UserError(f"{workdir} is not trained to its end; the same command resumes")


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
    experiment, found = load_module(EXPERIMENT), dict[str, dict[str, Any]]()
    names = f.only or experiment.variants()
    for size in SIZES:
        found |= tuned([name for name in names if name.startswith(size)], f)
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
