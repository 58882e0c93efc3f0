"""Ablations at equal parameters and best learning rates: writes docs/results/quality.md.

    python -m studies.quality [--runs=runs/quality] [--jobs=2] [--seeds=3]

Trains every variant of experiments/quality.py with seed 0 at each of its learning rates. The rate
with the lowest validation loss is trained with seeds 1, 2, ...: only these are in the tables. The
results are saved in results/quality.json.
"""

import math
from pathlib import Path

import numpy as np
from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.sweeps.loading import load_module
from nrgpt_jax.sweeps.progress import failure_of, is_done
from nrgpt_jax.training.divergence import RunDiverged
from studies.runner import ROOT, define_flags, train_all
from studies.tables import Record, Tables, load, spread, table, write

EXPERIMENT = ROOT / "experiments/quality.py"
SIZES = ("small", "large")
REFERENCE = "GPT_Rec_parallel_muon"


def tuned(names: list[str], f: flags.FlagValues) -> dict[str, Record]:
    """Train variants; return the best learning rate of each and its losses, nats per character."""
    experiment, runs = load_module(EXPERIMENT), Path(f.runs)
    cell = lambda name, rate: f"{name}@{rate:g}"

    def losses(cells: list[str], seeds: range) -> dict[str, list[float]]:
        workdirs = {c: [runs / c / str(seed) for seed in seeds] for c in cells}
        configs = {w: experiment.get_config(c) for c, own in workdirs.items() for w in own}
        for workdir, config in configs.items():
            config.seed = int(workdir.name)
        train_all(configs, f, may_diverge=True)  # a divergence is a result
        return {c: [*map(loss, own)] for c, own in workdirs.items()}

    # Side by side, the other seeds of every learning rate add little time.
    searched = [cell(name, rate) for name in names for rate in experiment.rates(name)]
    seen = losses(searched, range(f.seeds + 1 if f.side_by_side else 1))
    found = {}
    for name in names:
        first = {rate: seen[cell(name, rate)][0] for rate in experiment.rates(name)}
        found[name] = {
            "parameters": experiment.parameters(experiment.get_config(name).model),
            "searched": {f"{rate:g}": value for rate, value in first.items()},
            "learning_rate": min(first, key=lambda rate: first[rate]),
        }
    best = {name: cell(name, row["learning_rate"]) for name, row in found.items()}
    of_seeds = losses([*best.values()], range(1, f.seeds + 1))
    return {name: {**row, "losses": of_seeds[best[name]]} for name, row in found.items()}


def loss(workdir: Path) -> float:
    """Return the validation loss after the last step; infinite if the training diverged.

    Raises:
      UserError: the run has neither finished nor diverged.
    """
    if is_done(workdir):
        last = [line["val/loss"] for line in read_metrics(workdir) if "val/loss" in line][-1]
        return math.inf if last is None else last
    if failure_of(workdir).startswith(RunDiverged.__name__):
        return math.inf
    raise UserError(f"{workdir} is not trained to its end; the same command resumes")


def tables(found: dict[str, Record]) -> Tables:
    """Return one table per size, sorted by loss."""
    result = {}
    for size in SIZES:
        own = {n.removeprefix(f"{size}_"): r for n, r in found.items() if n.startswith(size)}
        means = {name: _mean(row["losses"]) for name, row in own.items()}
        reference = means.get(REFERENCE, math.nan)
        rows = []
        for name, mean in sorted(means.items(), key=lambda named: named[1]):
            row, difference = own[name], f"{mean - reference:+.3f}"
            cells = [f"{row['parameters']:,}", f"{row['learning_rate']:g}"]
            rows.append([f"`{name}`", *cells, spread(row["losses"], ".4f"), difference])
        head = ["variant", "parameters", "learning rate", "validation loss", "difference"]
        result[size] = table(head, rows)
    return result


def _mean(losses: list[float | None]) -> float:
    """Return the mean; infinite if a run has diverged (None in the file) or there is no run."""
    return float(np.mean([math.inf if value is None else value for value in losses or [None]]))


def main(f: flags.FlagValues) -> None:
    """Train the variants and write the page."""
    variants, found = load_module(EXPERIMENT).variants(), load("quality")
    for size in SIZES if f.seeds else ():
        found |= tuned([n for n in f.only or variants if n.startswith(size)], f)
    if f.measure:
        found = {name: found[name] for name in variants if name in found}
        write("quality", plain(found), tables, depth=1)


if __name__ == "__main__":
    define_flags("runs/quality", seeds=3)
    cli.run(lambda: main(flags.FLAGS))
