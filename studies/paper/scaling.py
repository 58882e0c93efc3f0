"""Figure 4: the best validation loss on Shakespeare, against parameters and training loss."""

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from nrgpt_jax.analysis.figures import BLACK, BLUE, GREEN, ORANGE, STYLE
from studies.paper.records import HEAD, at_best_rates, lowest, numbers, of_cells
from studies.tables import Columns, Record, summary

COLOURS = {"GPT": BLACK, "GPT_Rec_parallel": ORANGE, "NRGPT_H_FF2W": BLUE, "FFG_rope": GREEN}


COLUMNS: Columns = {
    "best": ("best validation loss", ".4f"),
    "train_at_best": ("training loss there", ".4f"),
    "last_validation": ("final validation loss", ".4f"),
}


def lines(records: list[Record]) -> list[str]:
    """Return a table with a row per model and size; the page gives the number of seeds."""
    cells = of_cells(at_best_rates(records))
    return summary(HEAD[:-1], {cell[:-1]: runs for cell, runs in cells.items()}, COLUMNS)


@mpl.rc_context(STYLE)
def figure(records: list[Record]) -> Figure:
    """Draw loss against parameters, and validation against training loss during training."""
    drawn = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    cells = at_best_rates(records)
    for model, colour in COLOURS.items():
        own = {width: runs for (name, width), runs in cells.items() if name == model}
        if not own:
            continue
        counts = [runs[0]["parameters"] for runs in own.values()]
        best = [[lowest(run)[0] for run in runs] for runs in own.values()]
        means, spreads = [np.mean(b) for b in best], [np.std(b, ddof=1) for b in best]
        left.errorbar(counts, means, spreads, color=colour, marker="o", lw=2, label=model)
        for runs in own.values():
            course = [
                np.mean([numbers(run, name) for run in runs], axis=0)
                for name in ("train", "validation")
            ]
            right.plot(*course, color=colour, lw=1.5)
            right.plot(course[0][-1], course[1][-1], "o", color=colour, ms=5)
    edge = right.get_xlim()
    right.plot(edge, edge, color="#999999", lw=1)
    left.set(xscale="log", xlabel="parameters", ylabel="best validation loss (nats)")
    right.set(xlabel="training loss (nats)", ylabel="validation loss (nats)", xlim=edge)
    left.legend(frameon=False, fontsize=10)
    return drawn
