"""The runner of all studies: trains what is not trained yet (`nrgpt_jax.sweeps`), and measures what
is not measured yet.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import disk
from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.configs import with_seeds
from nrgpt_jax.errors import UserError
from nrgpt_jax.sweeps.engine import Launcher, run_all
from nrgpt_jax.sweeps.loading import load_module
from nrgpt_jax.sweeps.progress import Watch, is_done

ROOT = Path(__file__).resolve().parent.parent


def define_flags(runs: str, seeds: int) -> None:
    """Those that `measure_all` reads, with their defaults."""
    flags.DEFINE_string("runs", runs, "Where the runs are, or are to be.")
    flags.DEFINE_integer("seeds", seeds, "Train so many of each.", 0)
    flags.DEFINE_list("only", [], "Train these variants; all by default.")
    flags.DEFINE_integer("jobs", 2, "Train N at a time.", 1)
    text = "Train the runs of a variant as one program, for an accelerator."
    flags.DEFINE_boolean("side_by_side", False, text)
    flags.DEFINE_boolean("retry", False, "Train again what has failed.")
    flags.DEFINE_boolean("measure", True, "Measure all that is trained, and write.")
    flags.DEFINE_boolean("again", False, "Measure anew what is measured already.")


def measure_all(
    experiment: Path, measure: Callable[[Path], dict[str, Any]], f: flags.FlagValues
) -> dict[str, list[dict[str, Any]]]:
    """Trains, and measures every run that is trained; the numbers of each variant, seed by seed.

    Args:
      experiment: an experiment file with `variants()`.
      measure: gives the numbers of a run directory, in which they are kept: `<experiment>.json`.
        What is not finite becomes None.
      f: of `define_flags`.
    """
    runs, module = Path(f.runs), load_module(experiment)
    names = list(module.variants())
    chosen = {name: module.get_config(name) for name in f.only or names}
    train_all({runs / n: c for n, c in with_seeds(chosen, f.seeds).items()}, f)
    found = dict[str, list[dict[str, Any]]]()
    for variant in names if f.measure else []:
        trained = [workdir for workdir in sorted((runs / variant).glob("*")) if is_done(workdir)]
        if trained:
            found[variant] = [measured(workdir, experiment.stem, measure, f) for workdir in trained]
            jax.clear_caches()
    return found


def measured(
    workdir: Path, name: str, measure: Callable[[Path], dict[str, Any]], f: flags.FlagValues
) -> dict[str, Any]:
    """The numbers of a run, which are kept in its `<name>.json`."""
    kept = workdir / f"{name}.json"
    if f.again or not kept.exists():
        numbers = json.dumps(plain(measure(workdir)), indent=1, allow_nan=False)
        disk.write_whole(kept, (numbers + "\n").encode())
        print(workdir, "measured", flush=True)
    return json.loads(kept.read_text())


def train_all(configs: dict[Path, ConfigDict], f: flags.FlagValues) -> None:
    """Trains what is not trained.

    Raises:
      UserError: some have failed, which is said when the others are done.
    """
    failed = train_possible(configs, f)
    for workdir, why in failed.items():
        raise UserError(
            f"{len(failed)} of {len(configs)} runs failed ({workdir}: {why}); its log is there; "
            "--retry trains them again"
        )


def train_possible(configs: dict[Path, ConfigDict], f: flags.FlagValues) -> dict[Path, str]:
    """Trains what is not trained; why those that have failed did."""
    launcher, options = Launcher(jobs=f.jobs), {"side_by_side": f.side_by_side, "retry": f.retry}
    return run_all(configs, launcher, watch=Watch(configs), **options) if configs else {}
