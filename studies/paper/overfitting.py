"""Controlled overfitting: equal parameters and steps, fractions of the training data."""

import math

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from nrgpt_jax.analysis.figures import STYLE
from studies.paper.records import numbers, shown
from studies.paper.scaling import COLOURS
from studies.tables import Columns, Record, spread, summary, table


def by_cell(records: list[Record]) -> dict[tuple[int, str], list[Record]]:
    """Group runs by data fraction and model: one list of seeds each."""
    cells: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        cells.setdefault((record["size"], record["model"]), []).append(record)
    return dict(sorted(cells.items()))


COLUMNS: Columns = {
    "best": ("best validation loss", ".3f"),
    "best_step": ("at step", ".0f"),
    "last_validation": ("validation loss at the end", ".3f"),
    "last_train": ("training loss at the end", ".3f"),
}


def lines(records: list[Record]) -> list[str]:
    """Return a table with a row per data fraction and model, and one at equal training loss."""
    cells = by_cell(records)
    rows = {(_part(n), f"`{m}`", len(runs)): [*map(shown, runs)] for (n, m), runs in cells.items()}
    head = ["of the training split", "model", "seeds"]
    return [*summary(head, rows, COLUMNS), "", *_at_equal_training_loss(cells)]


def _at_equal_training_loss(cells: dict[tuple[int, str], list[Record]]) -> list[str]:
    """Return a table of validation losses at the highest final training loss of all runs."""
    models = list(dict.fromkeys(model for _, model in cells))
    rows = []
    for part in sorted({part for part, _ in cells}):
        runs_of = {model: cells.get((part, model), []) for model in models}
        level = np.nanmax([shown(r)["last_train"] for runs in runs_of.values() for r in runs])
        seen = [[validation_at(run, level) for run in runs] for runs in runs_of.values()]
        rows.append([_part(part), f"{level:.3f}", *(spread(values, ".3f") for values in seen)])
    names = (f"`{model}`" for model in models)
    return table(["of the training split", "training loss", *names], rows)


def validation_at(run: Record, level: float) -> float:
    """Interpolate the validation loss at which the training loss first reaches a level."""
    train, validation = numbers(run, "train"), numbers(run, "validation")
    at = int(np.argmax(train <= level))
    if not train[at] <= level:
        return math.nan
    if at == 0:
        return float(validation[0])
    share = (train[at - 1] - level) / (train[at - 1] - train[at])
    return float(validation[at - 1] + share * (validation[at] - validation[at - 1]))


def _part(parts: int) -> str:
    return "all" if parts == 1 else f"1/{parts}"


@mpl.rc_context(STYLE)
def figure(records: list[Record]) -> Figure:
    """Draw losses against the data fraction, and loss curves of the smallest fraction."""
    drawn = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    cells = by_cell(records)
    for model, colour in COLOURS.items():
        own = {part: runs for (part, name), runs in cells.items() if name == model}
        if not own:
            continue
        runs_of = {100 / part: [*map(shown, runs)] for part, runs in own.items()}
        mean = lambda name, of=runs_of: [np.mean([r[name] for r in runs]) for runs in of.values()]
        shares, line = [*runs_of], {"color": colour, "marker": "o"}
        left.plot(shares, mean("last_validation"), lw=2, label=f"{model}, at the end", **line)
        left.plot(shares, mean("best"), lw=1.5, ls="--", mfc="white", **line)
        for run in own[max(own)]:
            right.plot(run["steps"], numbers(run, "validation"), color=colour, lw=1.5)
            right.plot(run["steps"], numbers(run, "train"), color=colour, lw=1.5, ls=":")
    left.set(xscale="log", xlabel="part of the training split (%)")
    left.set(ylabel="validation loss (nats)", title="at the end, and at its best (dashed)")
    left.set_xticks([100 / part for part, _ in cells])
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_xticks([], minor=True)
    right.set(
        xlabel="training step", title=f"on {_part(max(cells)[0])}: validation, training (dotted)"
    )
    left.legend(frameon=False, fontsize=10)
    return drawn
