"""Overfitting under control: equal parameters and steps, parts of the training data."""

import math

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from nrgpt_jax.analysis.figures import STYLE
from studies.paper.records import Record, lowest, numbers
from studies.paper.scaling import COLOURS
from studies.tables import spread, table


def by_cell(records: list[Record]) -> dict[tuple[int, str], list[Record]]:
    """The seeds of each part of the data and model."""
    cells: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        cells.setdefault((record["size"], record["model"]), []).append(record)
    return dict(sorted(cells.items()))


def lines(records: list[Record]) -> list[str]:
    """A row for each part of the data and model, and one table at equal training loss."""
    rows, cells = [], by_cell(records)
    for (parts, model), runs in cells.items():
        best, at = zip(*(lowest(run) for run in runs), strict=True)
        steps = [run["steps"][i] for run, i in zip(runs, at, strict=True)]
        train, last = ([numbers(run, n)[-1] for run in runs] for n in ("train", "validation"))
        values = [(best, ".3f"), (steps, ".0f"), (last, ".3f"), (train, ".3f")]
        rows.append([_part(parts), f"`{model}`", len(runs), *(spread(*value) for value in values)])
    head = ["of the training split", "model", "seeds", "best validation loss", "at step"]
    found = table([*head, "validation loss at the end", "training loss at the end"], rows)
    return [*found, "", *_at_equal_training_loss(cells)]


def _at_equal_training_loss(cells: dict[tuple[int, str], list[Record]]) -> list[str]:
    """Validation loss where every model has the training loss that the slowest ends with."""
    models = list(dict.fromkeys(model for _, model in cells))
    rows = []
    for parts in sorted({parts for parts, _ in cells}):
        own = {model: cells[parts, model] for model in models if (parts, model) in cells}
        ends = [numbers(run, "train")[-1] for runs in own.values() for run in runs]
        level = float(np.nanmax(ends))
        seen = [[validation_at(run, level) for run in own.get(model, [])] for model in models]
        rows.append([_part(parts), f"{level:.3f}", *(spread(values, ".3f") for values in seen)])
    names = (f"`{model}`" for model in models)
    return table(["of the training split", "training loss", *names], rows)


def validation_at(run: Record, level: float) -> float:
    """The validation loss when the training loss first came down to a level, interpolated."""
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


def figure(records: list[Record]) -> Figure:
    """Losses against the part of the data, and in the course of the runs on the smallest."""
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = drawn.subplots(1, 2)
        cells = by_cell(records)
        for model, colour in COLOURS.items():
            own = {parts: runs for (parts, name), runs in cells.items() if name == model}
            if not own:
                continue
            shares = [100 / parts for parts in own]
            best = [np.mean([lowest(run)[0] for run in runs]) for runs in own.values()]
            last = [
                np.mean([numbers(run, "validation")[-1] for run in runs]) for runs in own.values()
            ]
            left.plot(shares, last, color=colour, marker="o", lw=2, label=f"{model}, at the end")
            left.plot(shares, best, color=colour, marker="o", lw=1.5, ls="--", mfc="white")
            for run in own[max(own)]:
                right.plot(run["steps"], numbers(run, "validation"), color=colour, lw=1.5)
                right.plot(run["steps"], numbers(run, "train"), color=colour, lw=1.5, ls=":")
        most = max(parts for parts, _ in cells)
        left.set(xscale="log", xlabel="part of the training split (%)")
        left.set(ylabel="validation loss (nats)", title="at the end, and at its best (dashed)")
        left.set_xticks([100 / parts for parts, _ in cells])
        left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_xticks([], minor=True)
        right.set(xlabel="training step", title=f"on {_part(most)}: validation, training (dotted)")
        left.legend(frameon=False, fontsize=10)
    return drawn
