"""Measure the cost of a descent guarantee: trains, measures, writes docs/results/rates.md.

    python -m studies.rates [--runs=runs/rates] [--jobs=2] [--seeds=3]

Trains the missing variants of experiments/rates.py (`--jobs` at a time, each on one core), and
measures all trained ones. The results are saved in the run directory and in results/rates.json.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nrgpt_jax.analysis.examination import examine
from nrgpt_jax.core.evidence import SCALES
from nrgpt_jax.datasets import Dataset, load_recorded
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from studies.measures import answered, excerpts, losses_at
from studies.runner import Found, run_study
from studies.tables import Columns, Record, Tables, summary

DEPTHS = (1, 2, 4)  # times the trained number of steps
PROMPTS = 1000  # held-out prompts, answered greedily
LONG = 120  # minimum number of steps for the context to converge
TEXTS, TOKENS = 4, 64  # texts for the certificates, and tokens per text


def measure(workdir: Path) -> Record:
    """Measure one run."""
    trained = load_pretrained(workdir)
    dataset = load_recorded(trained.config.data)
    found = {**_certificates(trained, dataset), **losses_at(trained, dataset, DEPTHS, 512)}
    for prompts in list(dataset.prompts.values())[:1]:
        found["answered"] = answered(trained, prompts, PROMPTS)[0]
    return found


def _certificates(trained: Pretrained, dataset: Dataset) -> Record:
    """Compute certificates, and motion at 4 times the trained depth, on validation texts."""
    texts = excerpts(dataset.validation, TEXTS, TOKENS)
    seen = [examine(trained, text) for text in texts]
    certificates = [found.certificate for found in seen]
    longer = max(LONG, seen[0].num_steps)
    late = [examine(trained, text, num_steps=longer).certificate for text in texts]
    at_rest = sum(c.steps_converged for c in late)
    rose = sum(c.rises_converged * c.steps_converged for c in late if c.steps_converged)
    mean = lambda values: float(np.mean(list(values)))
    whole = not any(found.diverged_at for found in seen)
    at_end = lambda values: mean(values) if whole else math.nan
    first = ("proposition", "smallest_eigenvalue", "largest_eigenvalue")
    return {
        **{name: getattr(certificates[0], name) for name in first},
        "uphill": mean(c.uphill for c in certificates),
        "rises": mean(c.rises for c in certificates),
        "steps_converged": at_rest,
        "rises_converged": rose / at_rest if at_rest else math.nan,
        "largest_step_scale": min(c.largest_step_scale for c in certificates),
        "diverged_at": [found.diverged_at for found in seen],
        "speed_at_4T": at_end(np.median(found.speeds[-1]) for found in seen),
        "at_rest_by_4T": at_end(np.mean(found.settled < found.num_steps) for found in seen),
        "agreement_at_4T": at_end(np.mean(found.predictions.agreement[-1]) for found in seen),
    }


# The page -----------------------------------------------------------------------------------------


def extremes(scales: Sequence[float | None]) -> str:
    """Format the smallest and largest scale; None: even the longest step tried descends."""
    found = [math.inf if scale is None else scale for scale in scales]
    bound = lambda scale: f"> {max(SCALES):g}" if math.isinf(scale) else f"{scale:.2g}"
    least, most = min(found), max(found)
    return bound(least) if least == most else f"{bound(least)} to {bound(most)}"


QUALITY: Columns = {
    "answered": ("prompts answered", ".1%"),
    "loss_at_1T": ("loss at T, nats", ".3f"),
    "loss_at_2T": ("at 2T", ".3f"),
    "loss_at_4T": ("at 4T", ".3f"),
}
DESCENT: Columns = {
    "smallest_eigenvalue": ("smallest eigenvalue of sym(eta)", ".3g"),
    "largest_eigenvalue": ("largest", ".3g"),
    "uphill": ("steps that begin uphill", ".1%"),
    "rises": ("steps that end higher", ".1%"),
    "rises_converged": ("rises, context converged", ".1%"),
    "largest_step_scale": ("longest descending step", extremes),
}
MOTION: Columns = {
    "hits_at_1T": ("next token right at T", ".1%"),
    "hits_at_2T": ("at 2T", ".1%"),
    "hits_at_4T": ("at 4T", ".1%"),
    "at_rest_by_4T": ("slow tokens at 4T", ".0%"),
    "speed_at_4T": ("median change of g", ".3f"),
    "agreement_at_4T": ("same prediction as at T", ".0%"),
}
TITLES = {
    "listops": "ListOps (modulo 5)",
    "shakespeare": "Shakespeare",
    "deep": "Deep: 30 steps on ListOps (modulo 5)",
}


def tables(found: Found) -> Tables:
    """Return three tables per task, under its title."""
    lines: list[str] = []
    for task, title in TITLES.items():
        cells = {n.split("_")[1]: rows for n, rows in found.items() if n.startswith(task)}
        own = {(f"`{rate}`",): records for rate, records in cells.items()}
        with_propositions = {
            (*rate, records[0]["proposition"] or "none"): records for rate, records in own.items()
        }
        counts = sorted({len(records) for records in own.values()})
        if own:
            seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
            lines += ["", f"## {title}, {seeds} seeds"]
            lines += ["", *summary(["rate", "proposition"], with_propositions, QUALITY)]
            for columns in (DESCENT, MOTION):
                lines += ["", *summary(["rate"], own, columns)]
    return {"rates": lines[1:]}


if __name__ == "__main__":
    run_study("rates", measure, tables, seeds=3)
