"""Figure 3: the share of ListOps prompts answered, against the number of parameters."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import optimize

from nrgpt_jax.analysis.figures import BLUE, GREEN, ORANGE, STYLE
from nrgpt_jax.cli import percent
from studies.paper.records import HEAD, PROMPTS, at_best_rates, lowest, of_cells
from studies.tables import Columns, Record, summary, table

PAPER = {"GPT_Rec_parallel": 2.3e4, "NRGPT_H_FF1": 2.4e4, "NRGPT_H_FF2W": 2.98e4}  # 80% crossings
COLOURS = {"GPT_Rec_parallel": ORANGE, "NRGPT_H_FF1": GREEN, "NRGPT_H_FF2W": BLUE}
CROSSED, DRAWS = 0.8, 500


def logistic(log_p: np.ndarray, middle: float, slope: float) -> np.ndarray:
    """Compute the share answered as a logistic function of log(parameters)."""
    return 1.0 / (1.0 + np.exp(-np.clip(slope * (log_p - middle), -50, 50)))


def fit(counts: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """Fit the logistic curve by least squares; return its middle and slope."""
    log_p, bounds = np.log(counts), ([0.0, 0.1], [30.0, 50.0])
    found, _ = optimize.curve_fit(logistic, log_p, shares, (log_p.mean(), 3.0), bounds=bounds)
    return float(found[0]), float(found[1])


def crossing(middle: float, slope: float) -> float:
    """Return the number of parameters at which the curve crosses `CROSSED`."""
    return float(np.exp(middle + np.log(CROSSED / (1 - CROSSED)) / slope))


def interval(counts: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """Return a 95% bootstrap interval of the crossing. Runs are resampled within their size, and
    prompts binomially; with one run per size, variation over seeds is not included."""
    random, found = np.random.default_rng(0), []
    of_size = [np.flatnonzero(counts == count) for count in counts]
    for _ in range(DRAWS):
        drawn = shares[[random.choice(same) for same in of_size]]
        found.append(crossing(*fit(counts, random.binomial(PROMPTS, drawn) / PROMPTS)))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def chosen(records: list[Record]) -> dict[str, list[Record]]:
    """Return, by model, the runs at the best learning rate of each width."""
    by_model: dict[str, list[Record]] = {}
    for (model, _), runs in at_best_rates(records).items():
        by_model.setdefault(model, []).extend(runs)
    return by_model


COLUMNS: Columns = {"best": ("validation loss", ".3f"), "answered": ("answered", ".1%")}


def lines(records: list[Record]) -> list[str]:
    """Return two tables: the runs, and the crossings of the fits."""
    crossings = [
        [f"`{model}`", where(*_points(runs)), f"{PAPER[model]:,.0f}"]
        for model, runs in chosen(records).items()
    ]
    head = ["model", f"crosses {percent(CROSSED, 0)} at (95% interval)", "the paper"]
    cells = of_cells(at_best_rates(records))
    return [*summary(HEAD, cells, COLUMNS), "", *table(head, crossings)]


def where(counts: np.ndarray, shares: np.ndarray) -> str:
    """Format the crossing and its interval, or state that it is outside the sizes."""
    crossed, (low, high) = crossing(*fit(counts, shares)), interval(counts, shares)
    if crossed < counts.min():
        return f"below the smallest, {counts.min():,.0f}"
    if crossed > counts.max():
        return f"beyond the largest, {counts.max():,.0f}"
    return f"{crossed:,.0f} ({low:,.0f} to {high:,.0f})"


def _points(runs: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([run["parameters"] for run in runs], float)
    return counts, np.array([run["answered"] for run in runs])


@mpl.rc_context(STYLE)
def figure(of_tasks: Mapping[str, list[Record]]) -> Figure:
    """Draw the share answered and the validation loss against parameters, one column per task."""
    drawn = Figure(figsize=(6 * len(of_tasks), 8), layout="constrained")
    axes = drawn.subplots(2, len(of_tasks), squeeze=False)
    for (upper, lower), (title, records) in zip(axes.T, of_tasks.items(), strict=True):
        for model, runs in chosen(records).items():
            (counts, shares), colour = _points(runs), COLOURS[model]
            grid = np.geomspace(counts.min(), counts.max(), 200)
            curve = logistic(np.log(grid), *fit(counts, shares))
            upper.plot(counts, 100 * shares, "o", color=colour, ms=6)
            upper.plot(grid, 100 * curve, color=colour, lw=2, label=model)
            upper.axvline(PAPER[model], color=colour, ls=":", lw=1.5)
            lower.plot(counts, [lowest(run)[0] for run in runs], "o", color=colour, ms=6)
        upper.axhline(100 * CROSSED, color="#999999", lw=1)
        upper.set(title=title, ylabel="prompts answered (%)", ylim=(-3, 103))
        lower.set(xlabel="parameters", ylabel="validation loss (nats)")
        for axis in (upper, lower):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
            axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes[0, 0].legend(frameon=False, fontsize=10, loc="upper left")
    return drawn
