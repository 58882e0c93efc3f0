"""What a rate that keeps its promise costs and brings: trains, measures, writes docs/rates.md.

    python -m studies.rates [--runs=runs/rates] [--jobs=2] [--seeds=3]

Trains every variant of experiments/rates.py that is not trained yet (some at a time, each on one
core), then measures all that are and writes docs/rates.md and docs/rates.json. Each
seed's measurement is kept in its run directory.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.analysis.examination import examine
from nrgpt_jax.core.evidence import SCALES
from nrgpt_jax.datasets import Dataset, load_recorded
from nrgpt_jax.datasets.pipeline import validation_batches
from nrgpt_jax.models import sharding
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from nrgpt_jax.training import evaluation
from studies.runner import ROOT, define_flags, measure_all
from studies.tables import spread, table

EXPERIMENT, DOCS = ROOT / "experiments/rates.py", ROOT / "docs"
DEPTHS = (1, 2, 4)  # times the trained number of steps
PROMPTS = 1000  # held-out ones, answered greedily
LONG = 120  # steps that contexts have to come to rest
TEXTS, TOKENS = 4, 64  # that certificates are measured on


def measure(workdir: Path) -> dict[str, Any]:
    """The numbers of one run."""
    trained = load_pretrained(workdir)
    dataset = load_recorded(trained.config.data)
    return {**_certificates(trained, dataset), **_quality(trained, dataset)}


def _certificates(trained: Pretrained, dataset: Dataset) -> dict[str, Any]:
    """Certificates and motion at 4 times the trained depth, over texts of the validation split."""
    tokens = dataset.validation.tokens
    starts = np.linspace(0, len(tokens) - TOKENS, TEXTS).astype(int)
    seen = [examine(trained, tokens[start : start + TOKENS]) for start in starts]
    certificates = [found.certificate for found in seen]
    longer = max(LONG, seen[0].num_steps)
    late = [examine(trained, found.tokens, num_steps=longer).certificate for found in seen]
    at_rest = sum(c.steps_converged for c in late)
    rose = sum(c.rises_converged * c.steps_converged for c in late if c.steps_converged)
    mean = lambda values: float(np.mean(list(values)))
    whole = not any(found.diverged_at for found in seen)
    at_end = lambda values: mean(values) if whole else math.nan
    return {
        "proposition": certificates[0].proposition,
        "smallest_eigenvalue": certificates[0].smallest_eigenvalue,
        "largest_eigenvalue": certificates[0].largest_eigenvalue,
        "uphill": mean(c.uphill for c in certificates),
        "rises": mean(c.rises for c in certificates),
        "steps_converged": at_rest,
        "rises_converged": rose / at_rest if at_rest else float("nan"),
        "largest_step_scale": min(c.largest_step_scale for c in certificates),
        "diverged_at": [found.diverged_at for found in seen],
        "speed_at_4T": at_end(np.median(found.speeds[-1]) for found in seen),
        "at_rest_by_4T": at_end(np.mean(found.settled < found.num_steps) for found in seen),
        "agreement_at_4T": at_end(np.mean(found.predictions.agreement[-1]) for found in seen),
    }


def _quality(trained: Pretrained, dataset: Dataset) -> dict[str, Any]:
    """Validation loss and the share of prompts answered, at several depths."""
    config, mesh, found = trained.config, sharding.make_mesh(), {}
    for times in DEPTHS:
        steps = times * trained.model.num_steps
        model, variables = trained.model.with_num_steps(trained.variables, steps)
        windows = validation_batches(dataset.validation, config.model.context_length, 64, 512)
        step = evaluation.make_eval_step(model, mesh, num_symbols=dataset.tokenizer.size)
        seen = evaluation.evaluate_loss(step, variables["params"], windows, mesh)
        found[f"loss_at_{times}T"] = seen["val/loss"]
        found[f"hits_at_{times}T"] = seen["val/token_accuracy"]
    for prompts in list(dataset.prompts.values())[:1]:
        params = trained.variables["params"]
        found["answered"] = evaluation.prompt_accuracy(
            trained.model, params, prompts, limit=PROMPTS
        )
    return found


# The page -----------------------------------------------------------------------------------------

COLUMNS = {  # what one seed's number is called, and how a mean is written
    "smallest_eigenvalue": ("smallest eigenvalue of sym(eta)", ".3g"),
    "largest_eigenvalue": ("largest", ".3g"),
    "uphill": ("steps that begin uphill", ".1%"),
    "rises": ("steps that end higher", ".1%"),
    "rises_converged": ("rises, context at rest", ".1%"),
    "largest_step_scale": ("longest descending step", ".2g"),
}
MOTION = {
    "at_rest_by_4T": ("tokens at rest", ".0%"),
    "speed_at_4T": ("median change of g in a step", ".3f"),
    "agreement_at_4T": ("same best guess as at T", ".0%"),
}
QUALITY = {
    "answered": ("prompts answered", ".1%"),
    "hits_at_1T": ("next token right at T", ".1%"),
    "hits_at_2T": ("at 2T", ".1%"),
    "hits_at_4T": ("at 4T", ".1%"),
    "loss_at_1T": ("loss at T, nats", ".3f"),
    "loss_at_2T": ("at 2T", ".3f"),
    "loss_at_4T": ("at 4T", ".3f"),
}
TITLES = {
    "listops": "ListOps (modulo 5)",
    "shakespeare": "Shakespeare",
    "deep": "Deep: 30 steps on ListOps (modulo 5)",
}
NOTES = """\
Written by `make rates`, from `experiments/rates.py`: small models, each rate with the norm that
its proposition asks for, strict mask, mean ± standard deviation over seeds. The trainings are
short (minutes of one CPU core each), so the columns of quality compare rates under one small
budget; they are not what a rate reaches in the end, and the deep models, with a million tokens
each, have not learned to compute. All together took two hours and a half on two CPU cores, with
other work beside it.

- **begin uphill, end higher**: the share of token steps, with the token's context held fixed, that
  set out in a direction in which its energy rises, and that end at a higher energy; measured on
  4 texts of 64 tokens over 4T steps (T: trained).
- **rises, context at rest**: the same as "end higher" of those token steps in which no token before
  it changed its g by more than 1%, over 120 steps; token 0, which has none before it, left out.
- **longest descending step**: how many times longer than its own the steps of the model could be
  at all of these places for the energy to fall (0: somewhere it rises however short they are);
  from the least of the seeds to the most.
- **tokens at rest**: whose g changes by at most 1% a step, by 4T. Behind a norm x grows and steps
  of one length turn it less and less, so slow is not yet converged: the prediction may still
  drift.
- "none": energies had diverged before 4T, or no context came to rest. (Where the guarantee holds,
  a step can still end higher: it is too long.)
"""


def page(found: dict[str, list[dict[str, Any]]]) -> str:
    """docs/rates.md"""
    lines = ["# What a rate that keeps its promise costs", "", *NOTES.splitlines()]
    for task, title in TITLES.items():
        cells = {name.split("_")[1]: rows for name, rows in found.items() if name.startswith(task)}
        if not cells:
            continue
        first = next(iter(cells.values()))
        seeds = sorted({len(rows) for rows in cells.values()})
        lines += ["", f"## {title}, {' to '.join(map(str, seeds[:1] + seeds[1:][-1:]))} seeds"]
        for columns in (QUALITY, COLUMNS, MOTION):
            names = [n for n in columns if n in first[0]]
            head = ["rate", "guarantee", *(columns[n][0] for n in names)]
            rows = [
                [f"`{rate}`", _promise(seeds_of), *(_cell(seeds_of, n, columns[n]) for n in names)]
                for rate, seeds_of in cells.items()
            ]
            lines += ["", *table(head, rows)]
    return "\n".join(lines) + "\n"


def _promise(rows: list[dict[str, Any]]) -> str:
    return rows[0]["proposition"] or "none"


def _cell(rows: list[dict[str, Any]], name: str, column: tuple[str, str]) -> str:
    _, form = column
    values = [row[name] for row in rows]
    if name == "largest_step_scale":  # None where even the longest that was tried descends
        least, most = (f(v if v is not None else math.inf for v in values) for f in (min, max))
        bound = lambda scale: f"> {max(SCALES):g}" if math.isinf(scale) else f"{scale:{form}}"
        return bound(least) if least == most else f"{bound(least)} to {bound(most)}"
    return spread([math.nan if v is None else v for v in values], form)


def main(f: flags.FlagValues) -> None:
    """Trains, measures, writes."""
    found = measure_all(EXPERIMENT, measure, f)
    if not f.measure:
        return
    text = page(found)
    (DOCS / "rates.json").write_text(json.dumps(found, indent=1) + "\n")
    (DOCS / "rates.md").write_text(text)
    print(f"written to {DOCS / 'rates.md'}")


if __name__ == "__main__":
    define_flags("runs/rates", seeds=3)
    cli.run(lambda: main(flags.FLAGS))
