"""A self-contained interactive page of an analysis, with a choice of step and token.

The page includes Bokeh's JavaScript and needs no network. `webpage.js` in this folder redraws it
when the step or the token changes.
"""

import itertools
from html import escape
from importlib import resources

import numpy as np
from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.events import DocumentReady
from bokeh.layouts import column, row
from bokeh.models import (
    CDSView,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    Div,
    HoverTool,
    IndexFilter,
    LinearColorMapper,
    Select,
    Slider,
    Span,
)
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from bokeh.resources import INLINE

from nrgpt_jax.analysis.examination import Analysis
from nrgpt_jax.analysis.figures import BLACK, BLUE, GREEN, ORANGE, show

# Line styles of energies: the total, then each term.
STYLES = (
    (BLACK, "solid"),
    (BLUE, "dashed"),
    (GREEN, "dotdash"),
    (ORANGE, "dotted"),
    ("#CC79A7", "dashed"),
    ("#56B4E9", "dotdash"),
    ("#D55E00", "dotted"),
)
Sources = dict[str, ColumnDataSource]


def webpage(result: Analysis, title: str, report: str) -> str:
    """Return the HTML of an analysis, with a title and a text report."""
    names = [show(symbol) for symbol in result.symbols]
    sources = _sources(result, names)
    slider = Slider(
        start=0, end=result.num_steps, value=result.depth, step=1, title="step", name="step"
    )
    options = [(str(n), f"{n}  {name}") for n, name in enumerate(names)]
    select = Select(title="token", value=str(len(names) - 1), options=options, width=160)
    readout = Div(name="readout", styles={"font-size": "17px", "padding-top": "18px"})
    strip, energies, guesses = _strip(sources), _energies(sources, result), _guesses(sources)
    landscape, drawn = _landscape(sources, result.depth)
    marker = Span(dimension="height", line_color=ORANGE, line_width=2)
    energies.add_layout(marker)
    shared = {"slider": slider, "select": select, "readout": readout, "marker": marker}
    constants = {
        "vocabulary": [show(s) for s in result.vocabulary],
        "trained": result.trained_steps,
    }
    code = resources.files("nrgpt_jax.analysis").joinpath("webpage.js").read_text(encoding="utf-8")
    update = CustomJS(args={**sources, **drawn, **shared, **constants}, code=code)
    slider.js_on_change("value", update)
    select.js_on_change("value", update)
    choose = "if (cb_obj.indices.length) select.value = String(cb_obj.indices[0])"
    picked = CustomJS(args={"select": select}, code=choose)
    sources["tokens"].selected.js_on_change("indices", picked)
    head = Div(text=f"<h2>{escape(title)}</h2><pre>{escape(report)}</pre>")
    parts = [head, row(slider, select, readout), strip, row(energies, landscape, guesses)]
    for plot in (strip, energies, landscape):
        plot.toolbar.logo = None
    document = Document(title=title)
    document.add_root(column(*parts))
    document.js_on_event(DocumentReady, update)
    return file_html(document, INLINE, title)


def _sources(result: Analysis, names: list[str]) -> Sources:
    """Return the sources: `all`, `guesses`, `images` hold the data; the page fills the others."""
    flat = lambda a: np.ascontiguousarray(a, dtype=np.float32).ravel()
    view, p = result.landscape, result.predictions
    k = p.tokens.shape[-1]
    pixel = view.axes[:, 0, 1] - view.axes[:, 0, 0]  # centred on a grid point
    (x, y), size = view.axes[:, :, 0].T - pixel / 2, pixel * view.axes.shape[-1]
    u, v = np.moveaxis(np.asarray(view.path), -1, 0)
    columns: dict[str, dict] = {
        "all": {
            **{name: flat(e) for name, e in result.path.energies.items()},
            "u": flat(u.T),
            "v": flat(v.T),
        },
        "guesses": {"token": p.tokens.ravel().astype(np.int32), "p": flat(p.probabilities)},
        "images": {
            "image": [e.astype(np.float32) for e in view.energy],
            "low": view.energy.min(axis=(1, 2)),
            "high": view.energy.max(axis=(1, 2)),
            **{"x": x, "y": y, "size": size},
        },
        "tokens": {
            "n": np.arange(len(names)),
            "symbol": names,
            "energy": result.path.energies["total"][result.depth],
            "percent": np.zeros(len(names)),
            "guess": [""] * len(names),
        },
        "bars": {"rank": list(range(k)), "percent": [0.0] * k, "guess": [""] * k},
        "lines": {"step": [], **{name: [] for name in result.path.energies}},
        "path": {"u": [], "v": [], "step": [], "total": []},
        "place": {"u": [], "v": []},
        "chosen": {"n": []},
    }
    return {name: ColumnDataSource(data) for name, data in columns.items()}


def _strip(sources: Sources):
    """Plot the text, token by token, coloured by energy."""
    plot = figure(
        height=180,
        width=1240,
        tools="tap,xwheel_zoom,xpan,reset",
        title="energy of every token at this step (hover; click to choose a token)",
        y_range=(-0.55, 1.35),
        x_axis_label="position",
    )
    energy = np.asarray(sources["all"].data["total"])
    mapper = LinearColorMapper(Cividis256, low=float(energy.min()), high=float(energy.max()))
    colour = {"field": "energy", "transform": mapper}
    tokens, cell = sources["tokens"], ("n", -0.2, 0.96, 0.6)
    filled = {"fill_color": colour, "line_color": None, "nonselection_fill_alpha": 1.0}
    cells = plot.rect(*cell, source=tokens, name="tokens", **filled)
    _symbols(plot, tokens)
    framed = {"fill_color": None, "line_color": ORANGE, "line_width": 3}
    plot.rect(*cell, source=sources["chosen"], **framed)
    about = [
        ("token", "@n @symbol"),
        ("energy", "@energy{0.00}"),
        ("next", "@guess (@percent{0.0}%)"),
    ]
    plot.add_tools(HoverTool(renderers=[cells], tooltips=about))
    plot.add_layout(ColorBar(color_mapper=mapper, width=8), "right")
    plot.yaxis.visible = plot.grid.visible = False
    return plot


def _symbols(plot, tokens: ColumnDataSource) -> None:
    """Draw the texts of tokens above their cells, upright if they are long."""
    long = max(map(len, tokens.data["symbol"])) > 2
    plot.text(
        "n",
        0.15,
        text="symbol",
        source=tokens,
        angle=np.pi / 2 if long else 0.0,
        text_align="left" if long else "center",
        text_baseline="middle" if long else "bottom",
        text_font_size="12px",
        nonselection_text_alpha=1.0,
    )


def _energies(sources: Sources, result: Analysis):
    """Plot the energies of the chosen token against the step, over those of all others."""
    plot = figure(
        height=380,
        width=440,
        title="energy of the token",
        x_axis_label="step",
        y_axis_label="energy",
    )
    total = result.path.energies["total"]
    steps = [list(range(len(total)))] * total.shape[1]
    plot.multi_line(steps, list(total.T.astype(np.float32)), color="#bbbbbb", line_alpha=0.5)
    names = ["total", *(name for name in result.path.energies if name != "total")]
    for name, (colour, dash) in zip(names, itertools.cycle(STYLES)):
        plot.line(
            "step",
            name,
            source=sources["lines"],
            color=colour,
            line_dash=dash,
            line_width=2.5,
            legend_label=name,
        )
    plot.add_layout(Span(location=result.trained_steps, dimension="height", line_dash="dashed"))
    plot.legend.background_fill_alpha = 0.6
    return plot


def _landscape(sources: Sources, depth: int):
    """Plot the chosen token's path over its energy."""
    plot = figure(
        height=380,
        width=420,
        title=f"its path; energy with the context of step {depth}",
        x_axis_label="first principal direction",
        x_range=(0, 1),
        y_range=(0, 1),
        y_axis_label="second principal direction",
    )
    chosen, mapper = IndexFilter(indices=[0]), LinearColorMapper(Cividis256, low=0, high=1)
    plot.image(
        "image",
        "x",
        "y",
        "size",
        "size",
        source=sources["images"],
        color_mapper=mapper,
        view=CDSView(filter=chosen),
    )
    plot.line("u", "v", source=sources["path"], color=ORANGE, line_width=2)
    dots = plot.scatter("u", "v", source=sources["path"], color=ORANGE, line_color=BLACK, size=6)
    plot.scatter(
        "u", "v", source=sources["place"], marker="star", size=20, color="white", line_color=BLACK
    )
    about = [("step", "@step"), ("energy, its context then", "@total{0.00}")]
    plot.add_tools(HoverTool(renderers=[dots], tooltips=about))
    plot.add_layout(ColorBar(color_mapper=mapper, width=8), "right")
    ranges = {"x_range": plot.x_range, "y_range": plot.y_range}
    return plot, {"filter": chosen, "mapper": mapper, **ranges}


def _guesses(sources: Sources):
    """Plot the most probable next tokens."""
    plot = figure(
        height=380,
        width=360,
        toolbar_location=None,
        title="next token (%)",
        x_range=(0, 118),
        y_range=(len(sources["bars"].data["rank"]) - 0.4, -0.6),
        tools="",
    )
    plot.hbar("rank", right="percent", height=0.7, source=sources["bars"], color=BLUE)
    plot.text(
        "percent",
        "rank",
        text="guess",
        source=sources["bars"],
        x_offset=6,
        text_baseline="middle",
        text_font_size="14px",
    )
    plot.yaxis.visible = plot.ygrid.visible = False
    return plot
