"""Figures of an analysis: energies, motion, predictions, landscapes. Each returns a Figure.

Colours are safe for colour-blind readers (cividis for token positions, Okabe and Ito's for lines).
"""

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nrgpt_jax.analysis.examination import Analysis

STYLE: Any = {
    "font.size": 12.5,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}
BLACK, ORANGE, BLUE, GREEN = "#000000", "#E69F00", "#0072B2", "#009E73"
PANELS = {"feedforward": "feed-forward"}
SIGNS = {ord(" "): "\u2423", ord("\n"): "\u21b5", ord("\t"): "\u21e5"}


@mpl.rc_context(STYLE)
def energies(result: Analysis) -> Figure:
    """Plot the energy of every token against the step, for each term and in total (Figure 2)."""
    names = [*(n for n in result.path.energies if n != "total"), "total"]
    figure, axes = _figure(1, len(names), width=4 * len(names), height=4.2)
    for axis, name in zip(axes, names, strict=True):
        _lines(axis, result, np.asarray(result.path.energies[name]))
        axis.set(title=PANELS.get(name, name), xlabel="step")
    axes[0].set_ylabel("energy of a token (dimensionless)")
    _mark_depth(axes, result)
    _position_bar(figure, axes, result)
    return figure


@mpl.rc_context(STYLE)
def convergence(result: Analysis) -> Figure:
    """Plot how far x and g move in a step, the gradient, and when each token converged."""
    figure, axes = _figure(2, 2, width=12, height=8)
    gradients = np.linalg.norm(result.path.grad_x, axis=-1)
    panels = [
        ("length of a step", "||x(t+1) - x(t)||", result.step_norms),
        ("what others see of it", "||g(t+1) - g(t)|| / ||g(t)||", result.speeds),
        ("gradient of a token's energy", "||dE/dx||", gradients),
    ]
    for axis, (title, label, values) in zip(axes, panels, strict=False):
        _lines(axis, result, values)
        axis.set(title=title, ylabel=label, xlabel="step", yscale="log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(mpl.ticker.LogFormatter(minor_thresholds=(1.5, 0.4)))
    axes[1].axhline(result.tolerance, color=ORANGE, lw=1.5)
    axes[1].annotate(
        "counts as converged",
        (1, result.tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(0, -12),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        backgroundcolor="#ffffffcc",
    )
    _mark_depth(axes[:3], result)
    _cascade(axes[3], result)
    _position_bar(figure, axes, result)
    return figure


def _cascade(axis: Axes, result: Analysis) -> None:
    n, rest = np.arange(len(result.tokens)), result.settled < result.num_steps
    axis.scatter(n[rest], result.settled[rest], s=24, color=BLUE, label="slower from here on")
    moving = np.full((~rest).sum(), result.num_steps)
    axis.scatter(
        n[~rest], moving, s=28, marker="^", color=ORANGE, label="not yet slower at the end"
    )
    axis.axhline(result.trained_steps, color=BLACK, ls="--", lw=1)
    title = f"cascade: when g changes by less than {result.tolerance:g} a step"
    axis.set(title=title, xlabel="token position", ylabel="step of convergence")
    axis.set_ylim(0, result.num_steps * 1.22)
    axis.legend(loc="upper left", fontsize=9, frameon=False)


@mpl.rc_context(STYLE)
def predictions(result: Analysis) -> Figure:
    """Plot the predictions after every step: probability, entropy, agreement, surprise."""
    figure, axes = _figure(2, 1, width=12, height=7)
    best = result.predictions.probabilities[..., 0]
    image = axes[0].imshow(best, aspect="auto", origin="lower", cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes[0], label="probability of the best guess", pad=0.01)
    n = range(len(result.tokens))
    if len(result.tokens) <= 80:
        _write_guesses(axes[0], result, best)
        angle = 90 if _long(result) else 0
        names = map(show, result.symbols)
        axes[0].set_xticks(n, names, fontsize=8, rotation=angle, parse_math=False)
    axes[0].axhline(result.depth, color="white", lw=1.5, ls="--", zorder=1)
    axes[0].yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    title = "most probable next token after each step (dashed: " + result.depth_name + ")"
    axes[0].set(title=title, ylabel="step", xlabel="text, token by token")
    right = axes[1].twinx()
    steps = np.arange(result.num_steps + 1)
    p = result.predictions
    curves = [
        (axes[1], p.entropy.mean(axis=1), BLUE, "-", "entropy"),
        (axes[1], p.surprise.mean(axis=1), BLACK, "-.", "surprise at the token that follows"),
        (
            right,
            100 * p.agreement.mean(axis=1),
            ORANGE,
            "--",
            f"agreement with the {result.depth_name}",
        ),
    ]
    for axis, values, colour, style, label in curves:
        axis.plot(steps, values, color=colour, ls=style, lw=2, label=label)
    axes[1].set(title="mean over the tokens", xlabel="step", ylabel="nats", ylim=(0, None))
    right.set(ylabel="same best guess (%)", ylim=(0, 115))
    _mark_depth([axes[1]], result)
    lines = [Line2D([], [], color=c, ls=s, lw=2, label=label) for _, _, c, s, label in curves]
    axes[1].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    figure.legend(handles=lines, fontsize=10, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _write_guesses(axis: Axes, result: Analysis, best: np.ndarray) -> None:
    """Write the guess if it differs from that of the previous step."""
    tokens = result.predictions.tokens[..., 0]
    changed = np.ones_like(tokens, dtype=bool)
    changed[1:] = tokens[1:] != tokens[:-1]
    for t, n in np.argwhere(changed):
        colour = "white" if best[t, n] < 0.5 else "black"
        symbol = show(result.vocabulary[tokens[t, n]])
        symbol = symbol.strip("<>") or symbol
        place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "parse_math": False}
        axis.text(n, t, symbol[:3], color=colour, **place)


@mpl.rc_context(STYLE)
def landscapes(result: Analysis) -> Figure:
    """Plot paths of tokens over their energies, each in its plane of largest motion (Figure 1)."""
    chosen = _sure_tokens(result)
    figure, axes = _figure(1, len(chosen), width=4.1 * len(chosen), height=4.6)
    view, depth = result.landscape, result.depth
    for axis, n in zip(axes, chosen, strict=True):
        u, v = view.axes[n]
        energy = view.energy[n]
        contours = axis.contourf(u, v, energy, levels=24, cmap="cividis")
        axis.contour(u, v, energy, levels=12, colors="white", linewidths=0.4, alpha=0.6)
        path = view.path[n]
        axis.plot(*path.T, color=ORANGE, lw=2, marker="o", ms=4, mec=BLACK, mew=0.6)
        axis.plot(*path[0], marker="s", ms=9, color="white", mec=BLACK)
        axis.plot(*path[depth], marker="*", ms=15, color="white", mec=BLACK)
        guess = show(result.vocabulary[result.predictions.tokens[depth, n, 0]])
        observed = f"{100 * view.explained[n]:.0f}% of its motion in this plane"
        title = f"token {n} '{show(result.symbols[n])}', predicts '{guess}'\n{observed}"
        axis.set_title(title, parse_math=False)
        axis.set(xlabel="first principal direction", aspect="equal")
        bar = figure.colorbar(contours, ax=axis, orientation="horizontal", pad=0.02, shrink=0.8)
        bar.set_label("energy of the token")
        bar.locator = mpl.ticker.MaxNLocator(4)
        bar.update_ticks()
    axes[0].set_ylabel("second principal direction")
    figure.suptitle(
        f"square: first state, star: {result.depth_name}; its context held there", fontsize=11
    )
    return figure


FIGURES: Mapping[str, Callable[[Analysis], Figure]] = {
    "energies": energies,
    "convergence": convergence,
    "predictions": predictions,
    "landscapes": landscapes,
}


def _sure_tokens(result: Analysis) -> list[int]:
    """Return up to three tokens, spread over the text, with the most confident predictions."""
    n, depth = len(result.tokens), result.depth
    sure = result.predictions.probabilities[depth, :, 0]
    parts = np.array_split(np.arange(1, n), min(3, n - 1))
    return [int(part[np.argmax(sure[part])]) for part in parts]


def show(symbol: str) -> str:
    """Return a symbol in visible form: spaces and line ends as signs, codes by their number."""
    shown = symbol.translate(SIGNS) or "\u2205"
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown)


def _figure(rows: int, columns: int, width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _lines(axis: Axes, result: Analysis, values: np.ndarray) -> None:
    colours = mpl.colormaps["cividis"](np.linspace(0, 0.92, values.shape[1]))
    for colour, line in zip(colours, values.T, strict=True):
        axis.plot(line, color=colour, lw=1, alpha=0.8)
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))


def _mark_depth(axes: list[Axes], result: Analysis) -> None:
    if result.trained_steps <= result.num_steps:
        for axis in axes:
            axis.axvline(result.trained_steps, color=BLACK, ls="--", lw=1)
        axes[0].annotate(
            "trained depth",
            (result.trained_steps, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=9,
        )


def _position_bar(figure: Figure, axes: list[Axes], result: Analysis) -> None:
    colours = mpl.colormaps["cividis"](np.linspace(0, 0.92, 64))
    shades = mpl.cm.ScalarMappable(
        mpl.colors.Normalize(0, len(result.tokens) - 1), mpl.colors.ListedColormap(colours)
    )
    figure.colorbar(shades, ax=axes, label="token position", pad=0.01)


def _long(result: Analysis) -> bool:
    return max(map(len, result.symbols)) > 2
