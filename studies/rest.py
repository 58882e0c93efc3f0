"""Can models run more steps than trained? Trains, measures, writes docs/results/rest.md.

    python -m studies.rest [--runs=runs/rest] [--jobs=2] [--seeds=1]

Trains the missing variants of experiments/rest.py (`--jobs` at a time, each on one core), and
measures all trained ones. The results are saved in the run directory and in results/rest.json.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax.core.block import State
from nrgpt_jax.core.convergence import Attraction, attraction
from nrgpt_jax.core.descent import Convergence, RolloutOptions
from nrgpt_jax.datasets import Dataset, load_recorded
from nrgpt_jax.datasets.pipeline import validation_batches
from nrgpt_jax.generation.generate import Settings, cache_bytes, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import read_decoded
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.models.rollouts import partial_rollout
from nrgpt_jax.runs.pretrained import Pretrained, load_pretrained
from nrgpt_jax.training.losses import cross_entropy
from studies.measures import answered, excerpts, in_turns, losses_at
from studies.runner import Found, run_study
from studies.tables import Columns, Record, Tables, summary

TIMES = (1, 2, 4, 16, 100)  # multiples of the trained number of steps
WINDOWS = 64  # of the validation split, for the losses
ANSWERED_AT, ONE_ROW_AT = (1, 2, 4, 16), (1, 4)
PROMPTS = 200  # held-out prompts, answered greedily
TOLERANCES = (0.01, 0.03, 0.1)  # of the state, for adaptive stopping on a text
TEXTS_AT_ONCE, ROUNDS = 16, 3  # for the speed of generation
MOST, UNTIL = 4, Convergence(0.03, "state")  # adaptive stopping: at most MOST T steps
DESCENTS = (0, 1, 2, 4, 8)  # numbers of held descents after the usual one, for the losses
REST, TEXTS, TOKENS = 16, 4, 64  # attraction: measured after REST T steps, on TEXTS x TOKENS tokens
TOLERANCE = 1e-3  # of convergence: relative change of a state by one more step


def measure(workdir: Path) -> Record:
    """Measure one run."""
    trained = load_pretrained(workdir, "latest")
    dataset = load_recorded(trained.config.data)
    found = losses_at(trained, dataset, TIMES, WINDOWS) | _held(trained, dataset)
    if dataset.prompts:
        found |= _answers(trained, dataset)
    else:
        found |= _reading(trained, dataset) | _speed(trained)
    return found | _rest(trained, dataset)


def _held(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Compute the validation loss after further descents, each with the last one's context held."""
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
    """Compute the loss of the same windows in decoding: with a fixed-point cache, and with adaptive
    stopping, for which the mean number of steps over T is returned too."""
    model, T = trained.model, trained.model.num_steps
    batch = next(validation_batches(dataset.validation, model.context_length, WINDOWS, WINDOWS))
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


def _speed(trained: Pretrained) -> dict[str, float]:
    """Measure characters per second and the KV cache in MB, for a batch of `TEXTS_AT_ONCE`."""
    model, variables = trained.model, trained.variables
    new, sampling = model.context_length - 1, Sampling(temperature=1.0)
    prompts = [np.array([symbol]) for symbol in range(TEXTS_AT_ONCE)]
    ways = {
        "exact": Settings(sampling),
        "one_row": Settings(sampling, cache="fixed_point"),
        "stopping": Settings(sampling, num_steps=MOST * model.num_steps, stopping=UNTIL),
    }
    work = lambda settings: lambda: generate(model, variables, prompts, new, settings)
    seconds = in_turns({way: work(settings) for way, settings in ways.items()}, ROUNDS)
    found = {f"{way}_speed": TEXTS_AT_ONCE * new / median for way, median in seconds.items()}
    for way in ("exact", "one_row"):
        shape = TEXTS_AT_ONCE, model.context_length, ways[way].cache
        found[f"{way}_megabytes"] = cache_bytes(model, variables, *shape) / 1e6
    return found


def _answers(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Compute the share of held-out prompts answered greedily: at several depths, with a
    fixed-point cache, and with adaptive stopping, with its mean number of steps over T."""
    T, prompts = trained.model.num_steps, next(iter(dataset.prompts.values()))
    ask = lambda n, **ways: answered(trained, prompts, PROMPTS, num_steps=n * T, **ways)
    found = {f"answered_at_{n}T": ask(n)[0] for n in ANSWERED_AT}
    found |= {f"one_row_at_{n}T": ask(n, cache="fixed_point")[0] for n in ONE_ROW_AT}
    share, steps = ask(MOST, stopping=UNTIL)
    return {**found, "stopped": share, "steps": float(steps.mean()) / T}


def _rest(trained: Pretrained, dataset: Dataset) -> dict[str, float]:
    """Measure convergence of validation tokens after `REST` T steps, and attraction with radii."""
    texts = excerpts(dataset.validation, TEXTS, TOKENS)
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


PASSES: Columns = {
    f"loss_held_{n}": (f"{n} pass{'es' * (n > 1)}" if n else "usual descent", ".3f")
    for n in DESCENTS
}
CONVERGED: Columns = {"at_rest": ("converged", ".0%"), "attracts": ("attracting", ".0%")}
TABLES: dict[str, dict[str, Columns]] = {  # by task and title
    "listops": {
        "ListOps: prompts answered, and validation loss": {
            **{f"answered_at_{n}T": (f"answered at {n}T", ".1%") for n in (1, 2, 16)},
            **{f"loss_at_{n}T": (f"loss at {n}T", ".3f") for n in (1, 100)},
        },
        "ListOps: fixed-point cache, stopping and convergence": {
            "one_row_at_1T": ("cache, at T", ".1%"),
            "stopped": ("stopping at 3%", ".1%"),
            "steps": ("steps / T", ".2f"),
            **CONVERGED,
        },
        "ListOps: validation loss after refinement passes": PASSES,
    },
    "shakespeare": {
        "Shakespeare: validation loss": {
            **{f"loss_at_{n}T": (f"at {n}T", ".3f") for n in (1, 2, 16, 100)},
            "one_row_loss_at_1T": ("cache, at T", ".3f"),
        },
        "Shakespeare: stopping and convergence": {
            "stopped_loss_0.03": ("stopping at 3%", ".3f"),
            "stopped_steps_0.03": ("steps / T", ".2f"),
            **CONVERGED,
        },
        "Shakespeare: validation loss after refinement passes": PASSES,
    },
}


def tables(found: Found) -> Tables:
    """Return three tables per task, without the `_short` variants, which are only in rest.json."""
    lines: list[str] = []
    for task, columns_of in TABLES.items():
        own = {
            (f"`{variant.removeprefix(f'{task}_')}`", len(records)): records
            for variant, records in found.items()
            if variant.startswith(task) and not variant.endswith("_short")
        }
        for title, columns in columns_of.items() if own else ():
            lines += ["", f"{title}.", "", *summary(["variant", "seeds"], own, columns)]
    return {"rest": lines[1:]}


if __name__ == "__main__":
    run_study("rest", measure, tables, seeds=1)
