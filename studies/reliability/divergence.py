"""Non-finite values in batches, losses, gradients, parameters and checkpoints.

Functions of the training are patched in the training process.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax.errors import MISTAKE
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.training import step as steps
from studies.programs import Done, Running
from studies.reliability import judge, runs
from studies.reliability.moments import CHECKPOINT_EVERY, TRAIN_STEPS
from studies.reliability.report import Part
from studies.reliability.runs import Case, Disturbance, Whole

MOST_SKIPPED = 4  # in a row
SAVED = ("params", "optimizer")  # parts of a state
SKIPPING = {"max_skipped_steps": MOST_SKIPPED}
SLOWER = "optimizer.learning_rate"


def run(cases: int, seed: int, jobs: int) -> dict[str, Any]:
    """Non-finite numbers.

    At most 4 updates in a row may be skipped here. As documented: fewer are skipped and counted in
    `train/skipped_steps`. More end the run with exit code 2; the bad batch is saved, and the run
    resumes from the checkpoint that its message names. A checkpoint with non-finite values is not
    used, with a warning. If there is no other, training ends with exit code 2, and so does
    sampling.
    """
    with runs.undisturbed() as whole:
        drawn = training(cases, np.random.default_rng(seed))
        return runs.counted(runs.run_all(whole, [*drawn, *saved(whole)], jobs=jobs))


def training(cases: int, random: np.random.Generator) -> Iterator[Case]:
    """Yield runs with a few non-finite steps, and with non-finite steps to the end."""
    for _ in range(cases):
        for source in ("batch", "loss", "gradient"):
            first = int(random.integers(2, TRAIN_STEPS - MOST_SKIPPED))
            yield few(source, first, int(random.integers(1, MOST_SKIPPED)))
            yield endless(source, first)
        yield endless("parameters", int(random.integers(2, TRAIN_STEPS)))


def few(source: str, first: int, count: int) -> Case:
    """Return a case of `count` bad steps in a row, which the run skips and counts."""
    before = functools.partial(poison, source, first, count)

    def check(workdir: Path, done: Done) -> list[str]:
        records = [r for r in judge.read_records(workdir) if "train/loss" in r]
        skipped = [record["train/skipped_steps"] for record in records]
        wanted = [min(max(step - first + 1, 0), count) for step in range(1, TRAIN_STEPS + 1)]
        return [] if skipped == wanted else [f"skipped steps {skipped}, not {wanted}"]

    bad = Disturbance({0}, SKIPPING, before, check=check)
    return Case(f"{source} not finite, up to {MOST_SKIPPED - 1} in a row", [bad], equal=False)


def endless(source: str, first: int) -> Case:
    """Return a case of bad steps from `first` on: the run ends, and resumes without the fault."""
    before = functools.partial(poison, source, first)
    bad = Disturbance({MISTAKE}, SKIPPING, before, check=advised)
    again = Disturbance({0}, {**SKIPPING, SLOWER: 1e-4})
    return Case(f"{source} not finite from a step on", [bad, again], equal=False)


def advised(workdir: Path, done: Done) -> list[str]:
    """Check that the message names the first bad batch, and says how and where to resume."""
    wrong = []
    batch = re.search(r"its batch is (\S+\.npz)", done.stderr)
    if not (batch and {"inputs", "targets", "weights"} <= set(np.load(batch[1]))):
        wrong.append(f"the bad batch is not there: {done.stderr[-judge.SHORT :]}")
    saved = judge.steps_saved(workdir, "latest")
    begin = f"the checkpoint of step {saved[-1]}" if saved else "the beginning"
    for words in (f"lower --config.{SLOWER}", f"it resumes from {begin}"):
        if words not in done.stderr:
            wrong.append(f"it does not say: {words}: {done.stderr[-judge.SHORT :]}")
    return wrong


# Replaced in the process that trains --------------------------------------------------------------


def poison(source: str, first: int, count: int = TRAIN_STEPS) -> None:
    """Insert NaN into `count` steps from `first` on. By `source`: the weights of the batch, the
    loss, one element of a gradient, one parameter after the step `first`, or the saved state."""
    make_step, make_loss = steps.make_train_step, steps.make_loss_and_grads
    save = Checkpoints.save_latest
    nan_at = lambda step: jnp.where((step >= first) & (step < first + count), jnp.nan, 1.0)

    def step_made(*arguments: Any):
        step = make_step(*arguments)

        def changed(state, batch):
            number = int(state.step) + 1
            if source == "batch":
                batch = batch._replace(weights=batch.weights * np.float32(nan_at(number)))
            state, metrics = step(state, batch)
            after = source == "parameters" and number == first
            return _with_nan(state, "params") if after else state, metrics

        return changed

    def loss_made(*arguments: Any):
        loss_and_grads = make_loss(*arguments)

        def changed(params, batch, key, scale, step):
            (loss, aux), grads = loss_and_grads(params, batch, key, scale, step)
            leaves, tree = jax.tree.flatten(grads)
            if source == "loss":
                loss = loss * nan_at(step + 1)
            elif source == "gradient":
                leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].multiply(nan_at(step + 1))
            return (loss, aux), jax.tree.unflatten(tree, leaves)

        return changed

    def saved(checkpoints, step, state, *others, **named):
        bad = source in SAVED and step >= first
        save(checkpoints, step, _with_nan(state, source) if bad else state, *others, **named)

    steps.make_train_step, steps.make_loss_and_grads = step_made, loss_made  # type: ignore[assignment]
    Checkpoints.save_latest = saved  # type: ignore[assignment,method-assign]


def _with_nan(state: steps.TrainState, part: str) -> steps.TrainState:
    """Return the state with one NaN in a part of it."""
    leaves, tree = jax.tree.flatten(getattr(state, part))
    index = next(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
    array = np.array(leaves[index])
    array.flat[0] = np.nan
    leaves[index] = jax.device_put(array, leaves[index].sharding)
    return dataclasses.replace(state, **{part: jax.tree.unflatten(tree, leaves)})


# In checkpoints -----------------------------------------------------------------------------------


def saved(whole: Whole) -> Iterator[Case]:
    """Yield cases of checkpoints with valid checksums that contain a NaN."""

    last = 3 * CHECKPOINT_EVERY
    for part in SAVED:
        for which, first in ("the newest checkpoint", last), ("both checkpoints", 1):
            before = functools.partial(poison, part, first)
            bad, newest = Disturbance({0}, {"train_steps": last}, before), first == last
            check = unused if newest else functools.partial(refused, whole, part)
            again = Disturbance({0 if newest else MISTAKE}, check=check)
            yield Case(f"{part} not finite in {which}", [bad, again], equal=newest)


def unused(workdir: Path, done: Done) -> list[str]:
    """Check for the warning that a checkpoint is not used."""
    warned = "is not used: it holds numbers that are not finite" in done.stderr
    return [] if warned else [f"no warning: {done.stderr[: judge.SHORT]}"]


def refused(whole: Whole, part: str, workdir: Path, done: Done) -> list[str]:
    """Check for that warning, and that sampling from non-finite parameters is refused too."""
    given = f"--workdir={workdir}", "--checkpoint=latest", "--prompt=the ", "--max_new_tokens=4"
    sampled = runs.end(Running("sample", *given, environment=whole.environment()))
    return unused(workdir, done) + runs.wrong_end(sampled, {MISTAKE if part == "params" else 0})


PART = Part("what", 3, run)
