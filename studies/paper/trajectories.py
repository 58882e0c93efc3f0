"""Token energies along the descent: the paper's Figure 2."""

from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from nrgpt_jax.analysis.figures import BLACK, STYLE
from nrgpt_jax.cli import percent
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.sweeps.progress import is_done
from studies.tables import Record, table

TOKENS, TIMES = 64, 2  # tokens of the validation split; multiple of the trained number of steps
RUNS = {
    "NRGPT_H_FF1": "listops_transition/NRGPT_H_FF1_48@0.01/0",
    "NRGPT_H_FF2W": "listops_transition/NRGPT_H_FF2W_48@0.01/0",
    "sphere_decay": "rest/listops_sphere_decay/0",
}


def measure(runs: Path) -> dict[str, Record]:
    """Return T and the energies (TIMES T + 1, TOKENS) of the first tokens, by trained run."""
    return {title: _energies(runs / run) for title, run in RUNS.items() if is_done(runs / run)}


def _energies(workdir: Path) -> Record:
    trained = load_pretrained(workdir, "latest")
    tokens = load_recorded(trained.config.data).validation.tokens[:TOKENS][None]
    steps = trained.model.num_steps
    model, variables = trained.model.with_num_steps(trained.variables, TIMES * steps)
    energies_of: Any = jax.jit(lambda v: model.apply(v, tokens, method="energies"))
    total = np.asarray(energies_of(variables)["total"])[:, 0]
    return {"T": steps, "energies": total.round(4).tolist()}


def lines(found: dict[str, Record]) -> list[str]:
    """Return a table with a row per run: falling energies up to T, and from T to 2T."""
    rows = []
    for title, row in found.items():
        energies, T = np.array(row["energies"]), row["T"]
        fell = np.diff(energies, axis=0) < 0
        shares, means = [fell[:T], fell[T:], energies[T] < energies[0]], [energies[0], energies[T]]
        cells = [*(percent(s.mean(), 0) for s in shares), *(f"{m.mean():.2f}" for m in means)]
        rows.append([f"`{title}`", T, *cells])
    head = ["model", "T", "falling steps to T", "from T to 2T", "tokens lower at T than at 0"]
    return table([*head, "mean energy at 0", "at T"], rows)


@mpl.rc_context(STYLE)
def figure(found: dict[str, Record]) -> Figure:
    """Draw energy against the step, one line per token."""
    drawn = Figure(figsize=(4.4 * len(found), 4.4), layout="constrained")
    axes = np.ravel(drawn.subplots(1, len(found), squeeze=False))
    colours = mpl.colormaps["cividis"](np.linspace(0, 0.92, TOKENS))
    for axis, (title, row) in zip(axes, found.items(), strict=True):
        for colour, line in zip(colours, np.array(row["energies"]).T, strict=True):
            axis.plot(line, color=colour, lw=1, alpha=0.8)
        axis.axvline(row["T"], color=BLACK, ls="--", lw=1)
        axis.set(title=title, xlabel="step (dashed: T)")
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes[0].set_ylabel("energy of a token (dimensionless)")
    scale = mpl.colors.Normalize(0, TOKENS - 1), mpl.colors.ListedColormap(colours)
    drawn.colorbar(mpl.cm.ScalarMappable(*scale), ax=list(axes), label="token position", pad=0.01)
    return drawn
