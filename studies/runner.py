"""The runner of all studies: trains and measures missing runs, and writes the page."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli, disk
from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.configs import with_seeds
from nrgpt_jax.errors import UserError
from nrgpt_jax.sweeps.engine import Launcher, run_all
from nrgpt_jax.sweeps.loading import load_module
from nrgpt_jax.sweeps.progress import Watch, is_done
from nrgpt_jax.training.divergence import RunDiverged
from studies.tables import ROOT, Record, Tables, load, write

Measure = Callable[[Path], Record]
Found = dict[str, list[Record]]
"""Records by variant, one per seed."""


def define_flags(runs: str, seeds: int) -> None:
    """Define the flags of `measure_all`, with their defaults."""
    flags.DEFINE_string("runs", runs, "Where the runs are, or are to be.")
    flags.DEFINE_integer("seeds", seeds, "Number of seeds that are trained.", 0)
    flags.DEFINE_list("only", [], "Train these variants; all by default.")
    flags.DEFINE_integer("jobs", 2, "Train N at a time.", 1)
    flags.DEFINE_boolean("side_by_side", False, "Train a variant's runs as one program, on a GPU.")
    flags.DEFINE_boolean("retry", False, "Train again what has failed.")
    flags.DEFINE_boolean("measure", True, "Measure all that is trained, and write.")
    flags.DEFINE_boolean("again", False, "Measure again what is measured already.")


def run_study(name: str, measure: Measure, tables: Callable[[Found], Tables], seeds: int) -> None:
    """Run the program that trains experiments/NAME.py, by default with `seeds` seeds, measures the
    runs, and writes results/NAME.json and docs/results/NAME.md."""

    def main() -> None:
        found = measure_all(ROOT / f"experiments/{name}.py", measure, flags.FLAGS)
        if flags.FLAGS.measure:
            write(name, found, tables)

    define_flags(f"runs/{name}", seeds)
    cli.run(main)


def measure_all(experiment: Path, measure: Measure, f: flags.FlagValues) -> Found:
    """Train missing runs and measure all trained ones; return the records by variant.

    Variants without a trained run keep their records of the study's raw results.

    Args:
      experiment: an experiment file with `variants()`.
      measure: function that measures a run directory.
      f: the flags of `define_flags`.
    """
    runs, module, before = Path(f.runs), load_module(experiment), load(experiment.stem)
    names = list(module.variants())
    chosen = {name: module.get_config(name) for name in f.only or names}
    train_all({runs / n: c for n, c in with_seeds(chosen, f.seeds).items()}, f)
    found = Found()
    for variant in names if f.measure else []:
        trained = [workdir for workdir in sorted((runs / variant).glob("*")) if is_done(workdir)]
        if trained:
            found[variant] = [measured(w, experiment.stem, measure, f.again) for w in trained]
            jax.clear_caches()
        elif variant in before:
            found[variant] = before[variant]
    return found


def measured(workdir: Path, name: str, measure: Measure, again: bool = False) -> Record:
    """Return the record of a run, stored in its `<name>.json`; non-finite numbers are None."""
    kept = workdir / f"{name}.json"
    if again or not kept.exists():
        numbers = json.dumps(plain(measure(workdir)), indent=1, allow_nan=False)
        disk.write_whole(kept, (numbers + "\n").encode())
        print(workdir, "measured", flush=True)
    return json.loads(kept.read_text())


def train_all(
    configs: Mapping[Path, ConfigDict], f: flags.FlagValues, may_diverge: bool = False
) -> None:
    """Train the runs that are not trained yet.

    Raises:
      UserError: runs have failed, other than by a divergence that `may_diverge` allows; raised
        after all other runs are done.
    """
    if not configs:
        return
    options = {"side_by_side": f.side_by_side, "retry": f.retry}
    failed = run_all(configs, Launcher(jobs=f.jobs), watch=Watch(configs), **options)
    for workdir, why in failed.items():
        if not (may_diverge and why.startswith(RunDiverged.__name__)):
            what = f"{len(failed)} of {len(configs)} runs failed ({workdir}: {why})"
            raise UserError(f"{what}; its log is there; --retry trains them again")
