"""Whether models may make more steps than trained: trains, measures, writes docs/rest.md.

    python -m studies.rest [--runs=runs/rest] [--jobs=2] [--seeds=1]

Trains every variant of experiments/rest.py that is not trained yet (some at a time, each on one
core), then measures all that are; the table goes between the marks in docs/rest.md,
the numbers to docs/rest.json. Each seed's measurement is kept in its run directory.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from nrgpt_jax import cli
from nrgpt_jax.core.block import State
from nrgpt_jax.core.convergence import Attraction, attraction
from nrgpt_jax.core.descent import Convergence, RolloutOptions
from nrgpt_jax.datasets import Dataset, load_recorded
from nrgpt_jax.datasets.pipeline import validation_batches
from nrgpt_jax.generation.generate import Settings, cache_bytes, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import read_decoded
from nrgpt_jax.models import sharding
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.models.rollouts import partial_rollout
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from nrgpt_jax.training import evaluation
from nrgpt_jax.training.losses import cross_entropy
from studies.runner import ROOT, define_flags, measure_all
from studies.tables import spread, table

EXPERIMENT, DOCS = ROOT / "experiments/rest.py", ROOT / "docs"
TIMES = (1, 2, 4, 16, 100)  # the trained number of steps
WINDOWS = 64  # of the validation split, for the losses
ANSWERED_AT, ONE_ROW_AT = (1, 2, 4, 16), (1, 4)
PROMPTS = 200  # held-out ones, answered greedily
TOLERANCES = (0.01, 0.03, 0.1)  # of the state, at which tokens of a text stop
TEXTS_AT_ONCE, ROUNDS = 16, 3  # for the speed of generation
MOST, UNTIL = 4, Convergence(0.03, "state")  # times T, for tokens that stop by themselves
DESCENTS = (0, 1, 2, 4, 8)  # held ones after the usual one, for the losses
REST, TEXTS, TOKENS = 16, 4, 64  # when and on what tokens are asked whether they attract
TOLERANCE = 1e-3  # of rest: what one more step changes of a state, relative
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"


def measure(workdir: Path) -> dict[str, Any]:
    """The numbers of one run."""
    trained = load_pretrained(workdir, "latest")
    dataset = load_recorded(trained.config.data)
    parts = _losses, _held, _reading, _answers, _speed, _rest
    return {name: number for part in parts for name, number in part(trained, dataset).items()}


def _losses(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Validation loss in nats at several depths."""
    mesh, found = sharding.make_mesh(), {}
    for times in TIMES:
        steps = times * trained.model.num_steps
        model, variables = trained.model.with_num_steps(trained.variables, steps)
        windows = validation_batches(dataset.validation, model.context_length, WINDOWS, WINDOWS)
        step = evaluation.make_eval_step(model, mesh)
        seen = evaluation.evaluate_loss(step, variables["params"], windows, mesh)
        found[f"loss_at_{times}T"] = seen["val/loss"]
    return found


def _held(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Validation loss in nats after further descents, each held where the one before has ended."""
    model = trained.model
    batch = next(validation_batches(dataset.validation, model.context_length, WINDOWS, WINDOWS))
    weights, targets = jnp.asarray(batch.weights), jnp.asarray(batch.targets)

    @jax.jit
    def forward_cached(variables, context: State | None) -> tuple[State, jax.Array]:
        bound = model.bind(variables)
        end = partial_rollout(bound, batch.inputs, RolloutOptions(context=context))
        losses = cross_entropy(bound.readout(end.x), targets)
        return end, jnp.sum(losses * weights) / jnp.sum(weights)

    context, found = None, {}
    for number in range(DESCENTS[-1] + 1):
        context, loss = forward_cached(trained.variables, context)
        if number in DESCENTS:
            found[f"loss_held_{number}"] = float(loss)
    return found


def _reading(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Loss of the same windows, of a corpus, where each token is decoded: with both caches, and
    with tokens that stop by themselves, with their mean number of steps."""
    if dataset.prompts:
        return {}
    model, T = trained.model, trained.model.num_steps
    windows = validation_batches(dataset.validation, model.context_length, WINDOWS, WINDOWS)
    batch = next(windows)
    texts = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)

    def read(cache: str, times: int, until: Convergence | None = None) -> tuple[float, float]:
        deep, variables = model.with_num_steps(trained.variables, times * T)
        found = read_decoded(deep, variables, texts, Decoding(cache, until))
        mean = lambda values: float(np.average(values, weights=batch.weights))
        return mean(-found.log_probs), mean(found.steps) / T

    found = {f"one_row_loss_at_{n}T": read("fixed_point", n)[0] for n in ONE_ROW_AT}
    for tolerance in TOLERANCES:
        stopped = read("exact", MOST, Convergence(tolerance, "state"))
        found[f"stopped_loss_{tolerance}"], found[f"stopped_steps_{tolerance}"] = stopped
    return found


def _speed(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Characters a second and megabytes of the cache, for `TEXTS_AT_ONCE` texts of a corpus."""
    if dataset.prompts:
        return {}
    model, T = trained.model, trained.model.num_steps
    new = model.context_length - 1
    prompts = [np.array([symbol]) for symbol in range(TEXTS_AT_ONCE)]
    sampling, times = Sampling(temperature=1.0), dict[str, list[float]]()
    ways = {
        "exact": Settings(sampling),
        "one_row": Settings(sampling, cache="fixed_point"),
        "stopping": Settings(sampling, num_steps=MOST * T, stopping=UNTIL),
    }
    for number in range(1 + ROUNDS):
        for way, settings in ways.items():
            begin = time.perf_counter()
            generate(model, trained.variables, prompts, new, settings)
            if number:  # the first compiles
                times.setdefault(way, []).append(time.perf_counter() - begin)
    found = {f"{w}_speed": TEXTS_AT_ONCE * new / float(np.median(t)) for w, t in times.items()}
    for way in ("exact", "one_row"):
        shape = TEXTS_AT_ONCE, model.context_length, ways[way].cache
        found[f"{way}_megabytes"] = cache_bytes(model, trained.variables, *shape) / 1e6
    return found


def _answers(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """The share of held-out prompts answered, greedily: at several depths, with a fixed-point
    cache, and by tokens that stop by themselves, with their mean number of steps."""
    if not dataset.prompts:
        return {}
    model, params, T = trained.model, trained.variables["params"], trained.model.num_steps
    prompts, found = next(iter(dataset.prompts.values())), {}

    def answered(settings: Settings) -> float:
        return evaluation.prompt_accuracy(model, params, prompts, limit=PROMPTS, settings=settings)

    for times in ANSWERED_AT:
        found[f"answered_at_{times}T"] = answered(Settings(num_steps=times * T))
    for times in ONE_ROW_AT:
        one_row = Settings(cache="fixed_point", num_steps=times * T)
        found[f"one_row_at_{times}T"] = answered(one_row)
    until = Settings(num_steps=MOST * T, stopping=UNTIL)
    made = evaluation.continuations(model, params, prompts, limit=PROMPTS, settings=until)
    hits = evaluation.scores(made, prompts, model.context_length)
    steps = np.concatenate([new.steps for new in made])
    return {**found, "stopped": float(np.mean(hits)), "steps": float(steps.mean()) / T}


def _rest(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Whether tokens of the validation split are at rest after `REST` T steps, and attract."""
    tokens = dataset.validation.tokens
    starts = np.linspace(0, len(tokens) - TOKENS, TEXTS).astype(int)
    texts = np.stack([tokens[start : start + TOKENS] for start in starts]).astype(np.int32)
    steps = REST * trained.model.num_steps
    deep, variables = trained.model.with_num_steps(trained.variables, steps)
    model: Any = deep.with_implementation("autodiff")

    @jax.jit
    def look(variables) -> Attraction:
        bound = model.bind(variables)
        x = bound.embed(texts)
        inputs, dynamics_at = bound.dynamics(x)
        dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[-1], inputs))
        return attraction(dynamics, bound.forward(x)[0], jax.random.key(0))

    found = look(variables)
    radius = np.asarray(found.radius)
    return {
        "at_rest": float(np.mean(np.asarray(found.speed) <= TOLERANCE)),
        "attracts": float(np.mean(found.attracts(TOLERANCE))),
        "radius": float(np.median(radius)),
        "largest_radius": float(radius.max()),
    }


COLUMNS = {  # what one seed's number is called, and how a mean is written
    **{f"loss_at_{n}T": (f"loss at {n}T", ".3f") for n in TIMES},
    **{f"answered_at_{n}T": (f"answered at {n}T", ".1%") for n in ANSWERED_AT},
    **{f"one_row_at_{n}T": (f"at {n}T, fixed-point cache", ".1%") for n in ONE_ROW_AT},
    **{f"one_row_loss_at_{n}T": (f"at {n}T, fixed-point cache", ".3f") for n in ONE_ROW_AT},
    "stopped": ("stopping by itself", ".1%"),
    "steps": ("in steps / T", ".2f"),
    "stopped_loss_0.03": ("stopping by itself", ".3f"),
    "stopped_steps_0.03": ("in steps / T", ".2f"),
    "stopped_loss_0.1": ("stopping at 10%", ".3f"),
    "stopped_steps_0.1": ("in steps / T", ".2f"),
    "exact_speed": ("characters/s, exact cache", ",.0f"),
    "one_row_speed": ("fixed-point cache", ",.0f"),
    "stopping_speed": ("stopping", ",.0f"),
    "exact_megabytes": ("exact cache, MB", ".2f"),
    "one_row_megabytes": ("fixed-point cache, MB", ".2f"),
    "at_rest": (f"at rest by {REST}T", ".0%"),
    "attracts": ("and attracting", ".0%"),
    "radius": ("spectral radius, median", ".2f"),
    "largest_radius": ("largest", ".2f"),
}


HELD = {f"loss_held_{n}": (f"{n} held" if n else "loss, none held", ".3f") for n in DESCENTS}


def page(found: dict[str, list[dict[str, Any]]], text: str) -> str:
    """docs/rest.md with the tables, two a task, in their place."""
    number = lambda value: np.nan if value is None else value
    lines = []
    for task in dict.fromkeys(variant.partition("_")[0] for variant in found):
        own = {v: rows for v, rows in found.items() if v.startswith(task)}
        known = {name for rows in own.values() for row in rows for name in row}
        for shown in (COLUMNS, HELD):
            columns = {name: column for name, column in shown.items() if name in known}
            rows = [
                [f"`{variant}`", str(len(rows))]
                + [spread([number(row[n]) for row in rows], f) for n, (_, f) in columns.items()]
                for variant, rows in own.items()
            ]
            head = ["variant", "seeds", *(name for name, _ in columns.values())]
            lines += ["", *table(head, rows)]
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *lines, "", END + after])


def main(f: flags.FlagValues) -> None:
    """Trains, measures, writes."""
    found = measure_all(EXPERIMENT, measure, f)
    if not f.measure:
        return
    text = page(found, (DOCS / "rest.md").read_text())
    (DOCS / "rest.json").write_text(json.dumps(found, indent=1) + "\n")
    (DOCS / "rest.md").write_text(text)
    print(f"written to {DOCS / 'rest.md'}")


if __name__ == "__main__":
    define_flags("runs/rest", seeds=1)
    cli.run(lambda: main(flags.FLAGS))
