"""Records of the runs of a sweep, stored in results/results.json."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.runs.directory import CONFIG_FILE
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.sweeps.progress import is_done, parameters
from studies.measures import answered
from studies.runner import measured
from studies.tables import Record

PROMPTS = 500  # held-out prompts, answered greedily


def of_sweep(runs: Path) -> list[Record]:
    """Return the records of all trained runs, MODEL_SIZE/SEED or MODEL_SIZE@LEARNING_RATE/SEED."""
    found = sorted(path.parent for path in runs.glob(f"*/*/{CONFIG_FILE}"))
    return [of_run(workdir) for workdir in found if is_done(workdir)]


def of_run(workdir: Path) -> Record:
    """Return model, size, rate, seed, parameters, and losses (nats per token) at evaluation steps.
    The training loss is the last in metrics.jsonl: that of a batch (side by side: the mean since
    the previous evaluation, or over the last 250 steps)."""
    variant, _, rate = workdir.parent.name.partition("@")
    model, _, size = variant.rpartition("_")
    found: Record = {"model": model, "size": int(size), "rate": float(rate or "nan")}
    found |= {"seed": int(workdir.name), "parameters": parameters(workdir)}
    found |= {"steps": [], "train": [], "validation": []}
    last = math.nan
    for line in read_metrics(workdir):
        last = line.get("train/loss", last)
        if "val/loss" in line:
            found["steps"].append(line["step"])
            found["train"].append(last)
            found["validation"].append(line["val/loss"])
    return plain(found)


def workdir_of(runs: Path, record: Record) -> Path:
    """Return the run directory of a record in a sweep over learning rates."""
    variant = f"{record['model']}_{record['size']}@{record['rate']:g}"
    return runs / variant / str(record["seed"])


def share_answered(workdir: Path) -> float:
    """Return the share of `PROMPTS` held-out prompts answered greedily, measured once."""

    def measure(workdir: Path) -> Record:
        trained = load_pretrained(workdir, "latest")
        prompts = next(iter(load_recorded(trained.config.data).prompts.values()))
        return {"answered": answered(trained, prompts, PROMPTS)[0], "prompts": PROMPTS}

    return measured(workdir, "answered", measure)["answered"]


def at_best_rates(records: Iterable[Record]) -> dict[tuple[str, int], list[Record]]:
    """Select, by model and size, the learning rate with the lowest mean of best losses."""
    cells: dict[tuple[str, int], dict[float, list[Record]]] = {}
    for record in records:
        rates = cells.setdefault((record["model"], record["size"]), {})
        rates.setdefault(record["rate"], []).append(record)

    def order(runs: list[Record]) -> tuple[int, float]:
        """Order by number of seeds first: a rate with fewer has failed or untrained runs."""
        losses = [lowest(run)[0] for run in runs]
        return -len(runs), float(np.mean(np.nan_to_num(losses, nan=np.inf)))

    return {cell: min(rates.values(), key=order) for cell, rates in sorted(cells.items())}


LOSSES = ("train", "validation")
HEAD = ("model", "width", "parameters", "learning rate", "seeds")


def of_cells(cells: Mapping[tuple[str, int], list[Record]]) -> dict[tuple, list[Record]]:
    """Return the `shown` runs of each model and size, by their cells of `HEAD`."""
    first = lambda runs: (f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g}", len(runs))
    items = cells.items()
    return {
        (f"`{model}`", size, *first(runs)): [*map(shown, runs)] for (model, size), runs in items
    }


def shown(record: Record) -> Record:
    """Return a record with the losses of the tables: the best, its step, and the last."""
    (best, at), train, validation = lowest(record), *(numbers(record, n) for n in LOSSES)
    found = {"best": best, "best_step": record["steps"][at], "train_at_best": train[at]}
    return {**record, **found, "last_train": train[-1], "last_validation": validation[-1]}


def numbers(record: Record, name: str) -> np.ndarray:
    """Return the losses of a run; NaN after a divergence."""
    return np.array(record[name], float)


def lowest(record: Record) -> tuple[float, int]:
    """Return the lowest validation loss of a run and the index of its evaluation; NaN and the last
    index if the run has diverged at its end."""
    losses = numbers(record, "validation")
    at = len(losses) - 1 if np.isnan(losses[-1]) else int(np.nanargmin(losses))
    return float(losses[at]), at
