"""The runner of all studies: trains what is not trained yet, each run in a process of its own, and
measures what is not measured yet.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import flags

from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent


def variants(experiment: Path) -> list[str]:
    """The variants that an experiment file has, by its own `variants()`."""
    spec = importlib.util.spec_from_file_location(experiment.stem, experiment)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.variants())


def define_flags(runs: str, seeds: int) -> None:
    """Those that `measure_all` reads, with their defaults."""
    flags.DEFINE_string("runs", runs, "Where the runs are, or are to be.")
    flags.DEFINE_integer("seeds", seeds, "So many of each.", 1)
    flags.DEFINE_boolean("again", False, "Measure anew what is measured already.")
    flags.DEFINE_integer("jobs", 2, "Train so many at a time.", 1)


def measure_all(
    experiment: Path, measure: Callable[[Path], dict[str, Any]], f: flags.FlagValues
) -> dict[str, list[dict[str, Any]]]:
    """Trains and measures every variant; the numbers of each, seed by seed.

    Args:
      experiment: an experiment file with `variants()`.
      measure: gives the numbers of a run directory, in which they are kept: `<experiment>.json`.
        What is not finite becomes None.
      f: of `define_flags`.
    """
    runs, found = Path(f.runs), dict[str, list[dict[str, Any]]]()
    train_all(experiment, runs, f.seeds, f.jobs)
    for variant in variants(experiment):
        found[variant] = []
        for seed in range(f.seeds):
            workdir = runs / variant / str(seed)
            kept = workdir / f"{experiment.stem}.json"
            if f.again or not kept.exists():
                numbers = json.dumps(plain(measure(workdir)), indent=1, allow_nan=False)
                kept.write_text(numbers + "\n")
            found[variant].append(json.loads(kept.read_text()))
        jax.clear_caches()
        print(variant, "measured", flush=True)
    return found


def train_all(experiment: Path, runs: Path, seeds: int, jobs: int) -> None:
    """Trains every variant that is not trained, seed by seed, `jobs` at a time on a core each.

    Runs are `runs/<variant>/<seed>`.
    """
    cells = [(variant, seed) for seed in range(seeds) for variant in variants(experiment)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: _train(experiment, runs, *cell), cells))


def _train(experiment: Path, runs: Path, variant: str, seed: int) -> None:
    workdir = runs / variant / str(seed)
    if is_done(workdir):
        return
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "nrgpt_jax.train", f"--workdir={workdir.resolve()}"]
    command += [f"--config={experiment}:{variant}", f"--config.seed={seed}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "OMP_NUM_THREADS": "1"}
    print(f"training {workdir}", flush=True)
    with (workdir / "log").open("a") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)


def is_done(workdir: Path) -> bool:
    """Whether a run was trained to its last step."""
    try:
        target = json.loads((workdir / "config.json").read_text())["train_steps"]
    except FileNotFoundError:
        return False
    return any(r["step"] == target and "val/loss" in r for r in read_metrics(workdir))
