"""Is energy a signal? Energy and surprisal of corrupted text: writes docs/results/signal.md.

    python -m studies.signal [--runs=runs] [--seeds=3]

Reads the runs of `make rates` and of `make rest`; for missing runs, results/signal.json keeps its
earlier results. A share of the symbols of validation windows is replaced, or all are shuffled; each
of `SCORES` should be higher where a token is wrong. The area under the ROC curve (AUROC) is the
probability that it is.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from scipy import optimize, stats

from nrgpt_jax import cli
from nrgpt_jax.analysis.figures import BLACK, BLUE, GREEN, ORANGE, STYLE
from nrgpt_jax.configs import flattened
from nrgpt_jax.core.evidence import settling_steps
from nrgpt_jax.datasets import load_recorded
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from nrgpt_jax.sweeps.progress import is_done
from studies.measures import excerpts
from studies.runner import Found, measured
from studies.tables import DOCS, Columns, Record, Tables, load, summary, write

TASKS = ("shakespeare", "listops")
WAYS = {  # by the folder of their runs
    "rates": ("full", "gamma", "psd", "scalar", "identity"),
    "rest": ("full", "full_decay", "sphere_decay", "sphere_decay_held"),
}
MODELS = {study: [f"{t}_{way}" for t in TASKS for way in ways] for study, ways in WAYS.items()}
SHOWN = ("rates_shakespeare_gamma", "rest_shakespeare_sphere_decay")  # in the figure
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of the symbols of a text, replaced
SHOWN_SHARES = (0.02, 0.1, 0.2, 0.5)  # in tables; the figure has all
TOKEN_SHARE = 0.1  # replaced share in the windows for token-level scores
WINDOWS = 256
SCORES = {
    "surprise": (BLACK, "-"),  # -log p(token | past tokens), nats: the baseline
    "energy": (BLUE, "--"),  # after the last step
    "change": (ORANGE, "-."),  # energy after the last step minus that before the first
    "steps": (GREEN, ":"),  # until the energy stays near its final value
}
AT_REST = 0.1  # largest distance of a settled energy from its final value


def corrupted(tokens: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Replace a share of the symbols of windows by symbols drawn from the same windows."""
    others = random.permuted(tokens.ravel()).reshape(tokens.shape)
    chosen = random.random(tokens.shape) < share
    return np.where(chosen, others, tokens)


@partial(jax.jit, static_argnums=(0, 3))
def _scores(model, variables, tokens, known: int):
    bound = model.bind(variables)
    path = bound.trajectory(tokens)
    log_p = jax.nn.log_softmax(bound.readout(path.states[-1])[..., :known])
    energy = path.energies["total"]  # (T+1,B,N)
    surprise = -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    steps = settling_steps(jnp.abs(energy - energy[-1]), AT_REST)
    found = {"energy": energy[-1], "change": energy[-1] - energy[0], "steps": steps}
    return {"surprise": surprise, **{name: values[:, 1:] for name, values in found.items()}}


def scores(trained: Pretrained, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the scores (B,N-1) of all tokens but the first of windows (B,N)."""
    fixed, known = (trained.model, trained.variables), trained.tokenizer.size
    parts = [_scores(*fixed, part, known) for part in np.split(tokens, 8)]
    return {name: np.concatenate([np.asarray(p[name]) for p in parts]) for name in SCORES}


def auroc(wrong: np.ndarray, right: np.ndarray) -> float:
    """Return the probability that a wrong token scores higher than a right one; ties count half."""
    u = stats.mannwhitneyu(wrong.ravel(), right.ravel()).statistic
    return float(u / (wrong.size * right.size))


def measure(workdir: Path) -> Record:
    """Compute all AUROCs of one run, and the ROC curves of single tokens."""
    trained, random = load_pretrained(workdir), np.random.default_rng(int(workdir.name))
    stream = load_recorded(trained.config.data).validation
    intact = excerpts(stream, WINDOWS, trained.model.context_length)
    plain = scores(trained, intact)
    changed = corrupted(intact, TOKEN_SHARE, random)
    wrong, seen = (changed != intact)[:, 1:], scores(trained, changed)
    split = {name: (values[wrong], values[~wrong]) for name, values in seen.items()}
    rank = lambda values: stats.spearmanr(values.ravel(), plain["surprise"].ravel()).statistic
    found: Record = {
        "spearman": {name: float(rank(plain[name])) for name in SCORES},
        "tokens": {name: auroc(*parts) for name, parts in split.items()},
        "curve": {name: _curve(*parts) for name, parts in split.items()},
        "together": together(seen, wrong),
        "texts": {},
    }
    texts = {f"{share:g}": corrupted(intact, share, random) for share in SHARES}
    texts["shuffled"] = random.permuted(intact, axis=1)
    for label, tokens in texts.items():
        means = {name: values.mean(axis=1) for name, values in scores(trained, tokens).items()}
        found["texts"][label] = {n: auroc(m, plain[n].mean(axis=1)) for n, m in means.items()}
    return found


def together(seen: dict[str, np.ndarray], wrong: np.ndarray) -> dict[str, float]:
    """Compute the AUROC of surprise, and of a logistic regression on all scores that is fitted to
    the first half of the windows; both are evaluated on the second half."""
    half, features = len(wrong) // 2, np.stack([*seen.values()], axis=-1).astype(float)
    known, y = features[:half].reshape(-1, len(seen)), wrong[:half].ravel()
    mean, scale = known.mean(axis=0), np.maximum(known.std(axis=0), 1e-9)
    score = lambda w, x: (x - mean) / scale @ w[1:] + w[0]

    def loss(w):
        z = score(w, known)
        return np.mean(np.logaddexp(0, z) - y * z)

    weights, is_wrong = optimize.minimize(loss, np.zeros(1 + len(seen))).x, wrong[half:]
    judged = {"surprise": seen["surprise"][half:], "all": score(weights, features[half:])}
    return {name: auroc(s[is_wrong], s[~is_wrong]) for name, s in judged.items()}


def _curve(wrong: np.ndarray, right: np.ndarray) -> list[float]:
    """Return true positive rates at false positive rates 0, 0.02, ... 1; ties broken at random."""
    random = np.random.default_rng(0)
    wrong, right = (values + 1e-4 * random.random(values.shape) for values in (wrong, right))
    thresholds = np.quantile(right, np.linspace(1, 0, 51), method="higher")
    return [float(np.mean(wrong >= t)) for t in thresholds]


# The page -----------------------------------------------------------------------------------------


@mpl.rc_context(STYLE)
def figure(found: Found) -> Figure:
    """Draw the ROC curves of tokens, and the AUROC against the share of replaced symbols."""
    shown = {": ".join(name.split("_shakespeare_")): found[name] for name in SHOWN}
    drawn = Figure(figsize=(12, 4.4), layout="constrained")
    axes, (*_, (last, converged)) = drawn.subplots(1, 3), shown.items()
    for name, (colour, style) in SCORES.items():
        curves = np.array([record["curve"][name] for record in converged])
        _band(axes[0], np.linspace(0, 1, 51), curves, colour, style, name)
        for axis, records in zip(axes[1:], shown.values(), strict=True):
            texts = [[r["texts"][f"{share:g}"] for share in SHARES] for r in records]
            if name in texts[0][0]:
                areas = np.array([[text[name] for text in own] for own in texts])
                _band(axis, 100 * np.array(SHARES), areas, colour, style, name)
    axes[0].plot([0, 1], [0, 1], color="#999999", lw=1)
    axes[0].set(title=f"wrong characters, a tenth of all\n({last})")
    axes[0].set(xlabel="false positive rate", ylabel="true positive rate")
    for axis, model in zip(axes[1:], shown, strict=True):
        axis.axhline(0.5, color="#999999", lw=1)
        axis.set(title=f"corrupted texts\n({model})", xlabel="characters replaced (%)")
        axis.set(ylabel="area under the ROC curve", ylim=(0, 1.02), xscale="log")
        axis.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
        axis.set_xticks([], minor=True)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _band(axis, x, values, colour, style, label) -> None:
    """Draw the mean over seeds, in a band from the smallest to the largest value."""
    axis.plot(x, values.mean(axis=0), color=colour, ls=style, lw=2, label=label)
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)


TITLES = {
    "rates_shakespeare": "Shakespeare, inference rates",
    "rates_listops": "ListOps, inference rates",
    "rest_shakespeare": "Shakespeare, fading steps",
    "rest_listops": "ListOps, fading steps",
}
SINGLE: Columns = {
    **{f"tokens.{name}": (name, ".3f") for name in SCORES},
    "together.surprise": ("surprise alone", ".3f"),
    "together.all": ("all together", ".3f"),
}
RANKS: Columns = {f"spearman.{name}": (name, ".3f") for name in SCORES}
TEXTS: Columns = {
    **{f"{share:g}": (f"{share:.0%} replaced", ".3f") for share in SHOWN_SHARES},
    "shuffled": ("shuffled", ".3f"),
}


def tables(found: Found) -> Tables:
    """Return three tables per study and task, under their title."""
    lines: list[str] = []
    for key, title in TITLES.items():
        own = {f"`{v[len(key) + 1 :]}`": rows for v, rows in found.items() if v.startswith(key)}
        if not own:
            continue
        numbers = {(model,): [flattened(row) for row in rows] for model, rows in own.items()}
        of_score = {
            (model, name): [{t: r["texts"][t][name] for t in TEXTS} for r in rows]
            for model, rows in own.items()
            for name in SCORES
            if name in rows[0]["tokens"]
        }
        lines += ["", f"## {title}, {len(next(iter(own.values())))} seeds", ""]
        lines += ["Single tokens, 10% replaced:", ""]
        lines += summary(["model"], numbers, SINGLE)
        lines += ["", "Rank correlation with surprise over the tokens of intact text:", ""]
        lines += summary(["model"], numbers, RANKS)
        lines += ["", "Corrupted against intact texts, by the mean over tokens:", ""]
        lines += summary(["model", "score"], of_score, TEXTS)
    return {"signal": lines[1:]}


def main(f: flags.FlagValues) -> None:
    """Measure all complete runs, and write the page and its figure."""
    found: Found = load("signal")
    for study, variants in MODELS.items():
        for variant in variants:
            runs = [Path(f.runs) / study / variant / str(seed) for seed in range(f.seeds)]
            if all(map(is_done, runs)):
                found[f"{study}_{variant}"] = [
                    measured(r, "signal", measure, f.again) for r in runs
                ]
    write("signal", found, tables)
    if all(name in found for name in SHOWN):
        figure(found).savefig(DOCS / "figures/signal.png")


if __name__ == "__main__":
    flags.DEFINE_string("runs", "runs", "Where the runs of `make rates` and `make rest` are.")
    flags.DEFINE_integer("seeds", 3, "Number of seeds.", 1)
    flags.DEFINE_boolean("again", False, "Measure again what is measured already.")
    cli.run(lambda: main(flags.FLAGS))
