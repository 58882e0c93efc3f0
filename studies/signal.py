"""Is energy a signal? Finds corrupted text by energy and by surprise: writes docs/signal.md.

    python -m studies.signal [--runs=runs] [--seeds=3]

Reads the runs of `make rates` and of `make rest`; of those that are not there, docs/signal.json
keeps what was measured before. A part of the symbols of validation windows is replaced by others,
drawn as often as they occur in the corpus, or all are shuffled. Scores:

    surprise   -log p(token | those before it), nats: the baseline
    energy     E_A after the last step
after the last step minus E_A before the first
    steps      until E_A stays near what it is at the end

Each is expected to be higher where a token is wrong; the area under the ROC curve (AUROC) is the
chance that it is, 0.5 where it says nothing, less where it is lower there.
"""

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from scipy import optimize, stats

from nrgpt_jax import cli, disk
from nrgpt_jax.analysis.figures import BLACK, BLUE, GREEN, ORANGE, STYLE
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from nrgpt_jax.sweeps.progress import is_done
from studies.tables import spread, table

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODELS = {  # by where their runs are
    "rates": ("full", "gamma", "psd", "scalar", "identity"),
    "rest": ("full", "full_decay", "sphere_decay", "sphere_decay_held"),
}
TASKS = ("shakespeare", "listops")
SHOWN = ("rates_shakespeare", "gamma"), ("rest_shakespeare", "sphere_decay")  # in the figure
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of the symbols of a text, replaced
TOKEN_SHARE = 0.1  # where single tokens are told apart
WINDOWS = 256
SCORES = {
    "surprise": (BLACK, "-"),
    "energy": (BLUE, "--"),
    "change": (ORANGE, "-."),
    "steps": (GREEN, ":"),
}
AT_REST = 0.1  # how far an energy may still be from its last


def corrupted(tokens: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """The same windows with a share of their symbols replaced by others of the corpus."""
    others = random.permuted(tokens.ravel()).reshape(tokens.shape)
    chosen = random.random(tokens.shape) < share
    return np.where(chosen, others, tokens)


@partial(jax.jit, static_argnums=(0, 3))
def _scores(model, variables, tokens, known: int):
    bound = model.bind(variables)
    path = bound.trajectory(tokens)
    log_p = jax.nn.log_softmax(bound.readout(path.states[-1])[..., :known])
    energy = jnp.swapaxes(path.energies["total"], 0, 1)
    surprise = -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return {
        "surprise": surprise,
        "energy": energy[:, -1, 1:],
        "change": (energy[:, -1] - energy[:, 0])[:, 1:],
        "steps": _until_rest(energy)[:, 1:],
    }


def _until_rest(energy):
    """The step (B,N) from which on energies (B,T+1,N) stay near their last."""
    near = jnp.abs(energy - energy[:, -1:]) <= AT_REST
    from_here = jnp.flip(jnp.cumprod(jnp.flip(near, axis=1), axis=1), axis=1)
    return energy.shape[1] - jnp.sum(from_here, axis=1)


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
    found["together"] = together(scores(trained, changed), wrong)
    texts = {f"{share:g}": corrupted(intact, share, random) for share in SHARES}
    texts["shuffled"] = random.permuted(intact, axis=1)
    for label, tokens in texts.items():
        seen = scores(trained, tokens)
        found["texts"][label] = {
            name: auroc(seen[name].mean(axis=1), plain[name].mean(axis=1)) for name in SCORES
        }
    return found


def together(seen: dict[str, np.ndarray], wrong: np.ndarray) -> dict[str, float]:
    """Areas over the second half of the windows: of surprise, and of a logistic regression on all
    scores that was fitted to the first half."""
    half = len(wrong) // 2
    features = np.stack([values.astype(float) for values in seen.values()], axis=-1)
    known = features[:half].reshape(-1, len(seen))
    features = (features - known.mean(axis=0)) / np.maximum(known.std(axis=0), 1e-9)
    x, y = features[:half].reshape(-1, len(seen)), wrong[:half].ravel()

    def loss(w):
        z = x @ w[1:] + w[0]
        return np.mean(np.logaddexp(0, z) - y * z), np.concatenate(
            [[np.mean(p := 1 / (1 + np.exp(-z)) - y)], x.T @ p / len(y)]
        )

    fitted = optimize.minimize(loss, np.zeros(1 + len(seen)), jac=True).x
    score, is_wrong = features[half:] @ fitted[1:], wrong[half:]
    alone = seen["surprise"][half:]
    return {
        "surprise": auroc(alone[is_wrong], alone[~is_wrong]),
        "all": auroc(score[is_wrong], score[~is_wrong]),
    }


def _curve(wrong: np.ndarray, right: np.ndarray) -> list[float]:
    """True positive rates at false positive rates of 0, 0.02, ... 1; ties are broken by lot."""
    random = np.random.default_rng(0)
    wrong, right = (values + 1e-4 * random.random(values.shape) for values in (wrong, right))
    thresholds = np.quantile(right, np.linspace(1, 0, 51), method="higher")
    return [float(np.mean(wrong >= t)) for t in thresholds]


# The page -----------------------------------------------------------------------------------------

Found = dict[str, dict[str, list[dict[str, Any]]]]
"""By study and task, and by model, one record a seed."""


def figure(found: Found) -> Figure:
    """ROC curves of tokens, and areas against the share of replaced symbols."""
    shown = {f"{key.partition('_')[0]}: {model}": found[key][model] for key, model in SHOWN}
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(12, 4.4), layout="constrained")
        axes = drawn.subplots(1, 3)
        at_rest = list(shown.values())[1]
        for name, (colour, style) in SCORES.items():
            curves = np.array([r["curve"][name] for r in at_rest])
            _band(axes[0], np.linspace(0, 1, 51), curves, colour, style, name)
            for axis, records in zip(axes[1:], shown.values(), strict=True):
                texts = [[r["texts"][f"{share:g}"] for share in SHARES] for r in records]
                if name in texts[0][0]:
                    areas = np.array([[text[name] for text in own] for own in texts])
                    _band(axis, 100 * np.array(SHARES), areas, colour, style, name)
        axes[0].plot([0, 1], [0, 1], color="#999999", lw=1)
        axes[0].set(
            title=f"wrong characters, a tenth of all\n({list(shown)[1]})",
            xlabel="false positive rate",
            ylabel="true positive rate",
        )
        for axis, model in zip(axes[1:], shown, strict=True):
            axis.axhline(0.5, color="#999999", lw=1)
            axis.set(
                title=f"corrupted texts\n({model})",
                xlabel="characters replaced (%)",
                ylabel="area under the ROC curve",
                ylim=(0, 1.02),
                xscale="log",
            )
            axis.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
            axis.set_xticks([], minor=True)
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _band(axis, x, values, colour, style, label) -> None:
    """The mean over seeds, and all of them between its edges."""
    axis.plot(x, values.mean(axis=0), color=colour, ls=style, lw=2, label=label)
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)


NOTES = f"""\
Written by `make signal`, from the runs of `make rates` and, of models whose tokens come to rest
because their steps fade, of `make rest`; mean ± standard deviation over seeds.
{WINDOWS} windows of the validation split; a share of their symbols is replaced by others, drawn as
often as they occur, or all are shuffled. *Surprise* is -log p of a token given those before it, the
baseline; *energy* is the token's after the last step; *change* is that minus its energy before the
first step; *steps* is how many it makes until its energy stays within {AT_REST} of its last. Tables
give the area under the ROC curve for "higher where it is wrong": 0.5 says nothing, and less says
that the score is lower there. *All together* is a logistic regression on all scores, fitted to half
of the windows; it and *surprise alone* are measured on the other half.

![Areas and ROC curves](figures/signal.png)
"""
TITLES = {
    "rates_shakespeare": "Shakespeare, inference rates",
    "rates_listops": "ListOps, inference rates",
    "rest_shakespeare": "Shakespeare, models at rest",
    "rest_listops": "ListOps, models at rest",
}


def page(found: Found) -> str:
    """docs/signal.md"""
    lines = ["# Energy as a signal", "", *NOTES.splitlines()]
    for key, by_model in found.items():
        records = [record for rows in by_model.values() for record in rows]
        names = [n for n in SCORES if any(n in record["tokens"] for record in records)]
        seeds = len(next(iter(by_model.values())))
        lines += ["", f"## {TITLES[key]}, {seeds} seeds", ""]
        lines += ["Single tokens, a tenth of them wrong:", ""]
        both = {"surprise": "surprise alone", "all": "all together"}
        both = both if any("together" in record for record in records) else {}
        rows = [
            [f"`{m}`", *_cells(rows, "tokens", names), *_cells(rows, "together", both)]
            for m, rows in by_model.items()
        ]
        lines += table(["model", *names, *both.values()], rows)
        lines += ["", "Rank correlation with surprise, over the tokens of intact text:", ""]
        rows = [[f"`{m}`", *_cells(rows, "spearman", names)] for m, rows in by_model.items()]
        lines += table(["model", *names], rows)
        lines += ["", "Whole texts against intact ones, by the mean over their tokens:", ""]
        labels = {**{f"{s:g}": f"{s:.0%} replaced" for s in SHARES}, "shuffled": "shuffled"}
        rows = [
            [f"`{model}`", score, *(_area(records, label, score) for label in labels)]
            for model, records in by_model.items()
            for score in names
        ]
        lines += table(["model", "score", *labels.values()], rows)
    return "\n".join(lines) + "\n"


def _cells(records: list[dict[str, Any]], what: str, names: Iterable[str]) -> list[str]:
    return [spread([r.get(what, {}).get(name, math.nan) for r in records]) for name in names]


def _area(records: list[dict[str, Any]], label: str, score: str) -> str:
    return spread([r["texts"][label].get(score, math.nan) for r in records])


def main(f: flags.FlagValues) -> None:
    """Measures, writes."""
    kept = DOCS / "signal.json"
    found: Found = json.loads(kept.read_text()) if kept.exists() else {}
    for study, models in MODELS.items():
        for task in TASKS:
            for model in models:
                runs = [Path(f.runs) / study / f"{task}_{model}" / str(s) for s in range(f.seeds)]
                if not all(map(is_done, runs)):
                    continue
                records = [measure(load_pretrained(run), seed) for seed, run in enumerate(runs)]
                found.setdefault(f"{study}_{task}", {})[model] = records
                print(study, task, model, records[0]["tokens"], flush=True)
    disk.write_whole(kept, (json.dumps(found, indent=1) + "\n").encode())
    (DOCS / "figures").mkdir(exist_ok=True)
    if all(model in found.get(key, {}) for key, model in SHOWN):
        figure(found).savefig(DOCS / "figures/signal.png")
    (DOCS / "signal.md").write_text(page(found))
    print(f"written to {DOCS / 'signal.md'}")


if __name__ == "__main__":
    flags.DEFINE_string("runs", "runs", "Where the runs of `make rates` and `make rest` are.")
    flags.DEFINE_integer("seeds", 3, "So many of each.", 1)
    cli.run(lambda: main(flags.FLAGS))
