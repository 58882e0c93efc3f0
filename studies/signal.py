"""Is energy a signal? Finds corrupted text by energy and by surprise: writes docs/signal.md.

    python -m studies.signal [--runs=runs/rates] [--seeds=3]

Reads the runs of `make rates`. A part of the symbols of validation windows is replaced by others,
drawn as often as they occur in the corpus, or all are shuffled. Scores:

    surprise   -log p(token | those before it), nats: the baseline
    energy     E_A after the last step
    change     E_A after the last step minus E_A before the first

Each is expected to be higher where a token is wrong; the area under the ROC curve (AUROC) is the
chance that it is, 0.5 where it says nothing, less where it is lower there.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from scipy import stats

from nrgpt_jax import cli
from nrgpt_jax.analysis.figures import BLACK, BLUE, ORANGE, STYLE
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from studies.tables import spread, table

DOCS = Path(__file__).resolve().parent.parent / "docs"
TASKS, RATES = ("shakespeare", "listops"), ("full", "gamma", "psd", "scalar", "identity")
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of the symbols of a text, replaced
TOKEN_SHARE = 0.1  # where single tokens are told apart
WINDOWS = 256
SCORES = {"surprise": (BLACK, "-"), "energy": (BLUE, "--"), "change": (ORANGE, "-.")}


def corrupted(tokens: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """The same windows with a share of their symbols replaced by others of the corpus."""
    others = random.permuted(tokens.ravel()).reshape(tokens.shape)
    chosen = random.random(tokens.shape) < share
    return np.where(chosen, others, tokens)


@partial(jax.jit, static_argnums=(0, 3))
def _scores(model, variables, tokens, known: int):
    bound = model.bind(variables)
    path = bound.trajectory(tokens)
    log_p = jax.nn.log_softmax(bound.readout(path.states[:, -1])[..., :known])
    energy = path.energies["total"]
    surprise = -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return {
        "surprise": surprise,
        "energy": energy[:, -1, 1:],
        "change": (energy[:, -1] - energy[:, 0])[:, 1:],
    }


def scores(trained: Pretrained, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Each score of every token but the first of windows (B,N): (B,N-1)."""
    fixed, known = (trained.model, trained.variables), trained.tokenizer.size
    parts = [_scores(*fixed, part, known) for part in np.split(tokens, 8)]
    return {name: np.concatenate([np.asarray(p[name]) for p in parts]) for name in SCORES}


def auroc(wrong: np.ndarray, right: np.ndarray) -> float:
    """The chance that a wrong one scores higher than a right one, ties counting half."""
    u = stats.mannwhitneyu(wrong.ravel(), right.ravel()).statistic
    return float(u / (wrong.size * right.size))


def measure(trained: Pretrained, seed: int) -> dict[str, Any]:
    """All areas of one model; and a ROC curve, of single tokens."""
    random = np.random.default_rng(seed)
    n, stream = trained.model.context_length, load_recorded(trained.config.data).validation.tokens
    starts = np.linspace(0, len(stream) - n, WINDOWS).astype(int)
    intact = stream[starts[:, None] + np.arange(n)]
    plain = scores(trained, intact)
    found: dict[str, Any] = {"spearman": {}, "tokens": {}, "texts": {}, "curve": {}}
    changed = corrupted(intact, TOKEN_SHARE, random)
    wrong = (changed != intact)[:, 1:]
    for name, values in scores(trained, changed).items():
        rank = stats.spearmanr(plain[name].ravel(), plain["surprise"].ravel()).statistic
        found["spearman"][name] = float(rank)
        found["tokens"][name] = auroc(values[wrong], values[~wrong])
        found["curve"][name] = _curve(values[wrong], values[~wrong])
    texts = {f"{share:g}": corrupted(intact, share, random) for share in SHARES}
    texts["shuffled"] = random.permuted(intact, axis=1)
    for label, tokens in texts.items():
        seen = scores(trained, tokens)
        found["texts"][label] = {
            name: auroc(seen[name].mean(axis=1), plain[name].mean(axis=1)) for name in SCORES
        }
    return found


def _curve(wrong: np.ndarray, right: np.ndarray) -> list[float]:
    """True positive rates at false positive rates of 0, 0.02, ... 1."""
    thresholds = np.quantile(right, np.linspace(1, 0, 51), method="higher")
    return [float(np.mean(wrong >= t)) for t in thresholds]


# The page -----------------------------------------------------------------------------------------

Found = dict[str, dict[str, list[dict[str, Any]]]]
"""By task and rate, one record a seed."""


def figure(found: Found) -> Figure:
    """ROC curves of tokens, and areas against the share of replaced symbols."""
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(12, 4.4), layout="constrained")
        axes = drawn.subplots(1, 3)
        records = found["shakespeare"]["gamma"]
        for name, (colour, style) in SCORES.items():
            curves = np.array([r["curve"][name] for r in records])
            _band(axes[0], np.linspace(0, 1, 51), curves, colour, style, name)
            for axis, rate in zip(axes[1:], ("gamma", "full"), strict=True):
                areas = [
                    [r["texts"][f"{share:g}"][name] for share in SHARES]
                    for r in found["shakespeare"][rate]
                ]
                _band(axis, 100 * np.array(SHARES), np.array(areas), colour, style, name)
        axes[0].plot([0, 1], [0, 1], color="#999999", lw=1)
        axes[0].set(
            title=f"wrong characters among {1 - TOKEN_SHARE:.0%} right ones\n(rate gamma)",
            xlabel="false positive rate",
            ylabel="true positive rate",
        )
        for axis, rate in zip(axes[1:], ("gamma", "full"), strict=True):
            axis.axhline(0.5, color="#999999", lw=1)
            axis.set(
                title=f"corrupted texts of 64 characters\n(rate {rate})",
                xlabel="characters replaced (%)",
                ylabel="area under the ROC curve",
                ylim=(0, 1.02),
                xscale="log",
            )
            axis.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
            axis.set_xticks([], minor=True)
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def _band(axis, x, values, colour, style, label) -> None:
    """The mean over seeds, and all of them between its edges."""
    axis.plot(x, values.mean(axis=0), color=colour, ls=style, lw=2, label=label)
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)


NOTES = f"""\
Written by `make signal`, from the runs of `make rates`; mean ± standard deviation over seeds.
{WINDOWS} windows of the validation split; a share of their symbols is replaced by others, drawn as
often as they occur, or all are shuffled. *Surprise* is -log p of a token given those before it, the
baseline; *energy* is the token's after the last step; *change* is that minus its energy before the
first step. Tables give the area under the ROC curve for "higher where it is wrong": 0.5 says
nothing, and less says that the score is lower there.

![Areas and ROC curves](figures/signal.png)
"""


def page(found: Found) -> str:
    """docs/signal.md"""
    lines = ["# Energy as a signal", "", *NOTES.splitlines()]
    for task, by_rate in found.items():
        count = len(next(iter(by_rate.values())))
        lines += ["", f"## {task}, {count} seeds", "", "Single tokens, a tenth of them wrong:", ""]
        head = ["rate", *SCORES]
        lines += table(head, [[f"`{r}`", *_cells(by_rate[r], "tokens")] for r in by_rate])
        lines += ["", "Rank correlation with surprise, over the tokens of intact text:", ""]
        lines += table(head, [[f"`{r}`", *_cells(by_rate[r], "spearman")] for r in by_rate])
        lines += ["", "Whole texts against intact ones, by the mean over their tokens:", ""]
        labels = {**{f"{s:g}": f"{s:.0%} replaced" for s in SHARES}, "shuffled": "shuffled"}
        rows = [
            [f"`{rate}`", score, *(_area(records, label, score) for label in labels)]
            for rate, records in by_rate.items()
            for score in SCORES
        ]
        lines += table(["rate", "score", *labels.values()], rows)
    return "\n".join(lines) + "\n"


def _cells(records: list[dict[str, Any]], what: str) -> list[str]:
    return [spread([r[what][name] for r in records]) for name in SCORES]


def _area(records: list[dict[str, Any]], label: str, score: str) -> str:
    return spread([r["texts"][label][score] for r in records])


def main(f: flags.FlagValues) -> None:
    """Measures, writes."""
    found: Found = {}
    for task in TASKS:
        for rate in RATES:
            runs = [Path(f.runs) / f"{task}_{rate}" / str(seed) for seed in range(f.seeds)]
            records = [measure(load_pretrained(run), seed) for seed, run in enumerate(runs)]
            found.setdefault(task, {})[rate] = records
            print(task, rate, records[0]["tokens"], flush=True)
    (DOCS / "figures").mkdir(exist_ok=True)
    figure(found).savefig(DOCS / "figures/signal.png")
    (DOCS / "signal.json").write_text(json.dumps(found, indent=1) + "\n")
    (DOCS / "signal.md").write_text(page(found))
    print(f"written to {DOCS / 'signal.md'}")


if __name__ == "__main__":
    flags.DEFINE_string("runs", "runs/rates", "Where the runs of `make rates` are.")
    flags.DEFINE_integer("seeds", 3, "So many of each.", 1)
    cli.run(lambda: main(flags.FLAGS))
