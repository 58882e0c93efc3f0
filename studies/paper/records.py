"""What is kept of each run of a sweep: docs/results.json."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nrgpt_jax import disk
from nrgpt_jax.analysis.examination import plain
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.runs.directory import CONFIG_FILE
from nrgpt_jax.runs.metrics import read_metrics
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.sweeps.progress import is_done, parameters
from nrgpt_jax.training import evaluation

Record = dict[str, Any]
"""Of one run: model, size, rate, seed, parameters, and by evaluation step, train, validation."""

PROMPTS = 500  # held-out ones, answered greedily
KEPT = "answered.json"  # in a run directory


def of_sweep(runs: Path) -> list[Record]:
    """Of the runs that are trained, MODEL_SIZE/SEED or MODEL_SIZE@LEARNING_RATE/SEED."""
    found = sorted(path.parent for path in runs.glob(f"*/*/{CONFIG_FILE}"))
    return [of_run(workdir) for workdir in found if is_done(workdir)]


def of_run(workdir: Path) -> Record:
    """Its losses in nats a token; of training, as metrics.jsonl has them: the last batch that was
    written (side by side: the mean since the evaluation before, or over the last 250 steps)."""
    variant, _, rate = workdir.parent.name.partition("@")
    model, _, size = variant.rpartition("_")
    steps, train, validation, last = list[int](), [], [], math.nan
    for line in read_metrics(workdir):
        last = line.get("train/loss", last)
        if "val/loss" in line:
            steps.append(line["step"])
            train.append(last)
            validation.append(line["val/loss"])
    found = {"model": model, "size": int(size), "rate": float(rate or "nan")}
    found |= {"seed": int(workdir.name), "parameters": parameters(workdir)}
    return plain({**found, "steps": steps, "train": train, "validation": validation})


def answered(workdir: Path) -> float:
    """The share of `PROMPTS` held-out prompts answered greedily; measured once."""
    kept = workdir / KEPT
    if not kept.exists():
        trained = load_pretrained(workdir, "latest")
        prompts = next(iter(load_recorded(trained.config.data).prompts.values()))
        model, params = trained.model, trained.variables["params"]
        share = evaluation.prompt_accuracy(model, params, prompts, limit=PROMPTS)
        disk.write_whole(kept, json.dumps({"answered": share, "prompts": PROMPTS}).encode())
    return json.loads(kept.read_text())["answered"]


def at_best_rates(records: Iterable[Record]) -> dict[tuple[str, int], list[Record]]:
    """By model and size, the runs at the learning rate with the best lowest losses on average."""
    cells: dict[tuple[str, int], dict[float, list[Record]]] = {}
    for record in records:
        rates = cells.setdefault((record["model"], record["size"]), {})
        rates.setdefault(record["rate"], []).append(record)

    def order(runs: list[Record]) -> tuple[int, float]:
        """Those with the most seeds first: of the others some have failed, or are not trained."""
        losses = [lowest(run)[0] for run in runs]
        return -len(runs), float(np.mean(np.nan_to_num(losses, nan=np.inf)))

    return {cell: min(rates.values(), key=order) for cell, rates in cells.items()}


def numbers(record: Record, name: str) -> np.ndarray:
    """The losses of a run; NaN where it has diverged."""
    return np.array(record[name], float)


def lowest(record: Record) -> tuple[float, int]:
    """The lowest validation loss of a run, and which evaluation that was; of one that has diverged
    at its end NaN, and the last."""
    if record["validation"][-1] is None:
        return math.nan, len(record["validation"]) - 1
    losses = [math.inf if loss is None else loss for loss in record["validation"]]
    at = int(np.argmin(losses))
    return losses[at], at
