"""Numbers that are no longer numbers: in batches, losses, gradients, parameters and checkpoints.

Functions of the training are replaced in the process that trains. Bad steps that are few are left
out and counted; where they do not end, the run does, and what it prints is then done.
"""

import dataclasses
import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax.models import create_model, parameter_specs, sharding
from nrgpt_jax.runs.checkpoints import Checkpoints
from nrgpt_jax.runs.directory import load_config
from nrgpt_jax.training import optimizers, trainer
from nrgpt_jax.training import step as steps
from studies.programs import Done, Running
from studies.reliability import endings, judge
from studies.reliability.disk import counted, told
from studies.reliability.endings import MISTAKE, Result
from studies.reliability.tiny import CHECKPOINT_EVERY, TRAIN_STEPS, Whole, environment, undisturbed
from studies.tables import table

TITLE, CASES = "Numbers that are not finite", 3  # draws of the first bad step, of each kind
MOST_SKIPPED = 4  # in a row
SOURCES = ("batch", "loss", "gradient")


def run(cases: int = CASES, seed: int = 0, jobs: int = 1) -> dict[str, Any]:
    """Tries everything. Returns counts and what is wrong."""
    del jobs
    with tempfile.TemporaryDirectory() as name:
        whole = undisturbed(Path(name))
        return counted(told(_tried(whole, Path(name) / "run", cases, np.random.default_rng(seed))))


def _tried(
    whole: Whole, workdir: Path, cases: int, random: np.random.Generator
) -> Iterator[Result]:
    for _ in range(cases):
        for source in SOURCES:
            first = int(random.integers(2, TRAIN_STEPS - MOST_SKIPPED))
            yield few(whole, workdir, source, first, int(random.integers(1, MOST_SKIPPED)))
            yield endless(whole, workdir, source, first)
        yield endless(whole, workdir, "parameters", int(random.integers(2, TRAIN_STEPS)))
    for part in ("params", "optimizer"):
        yield saved(whole, workdir, part, newest_only=True)
        yield saved(whole, workdir, part, newest_only=False)
    yield sampled(whole, workdir)


# While it trains ----------------------------------------------------------------------------------


def few(whole: Whole, workdir: Path, source: str, first: int, count: int) -> Result:
    """So many bad steps in a row: the run goes on, and says how many it has left out."""
    done = _train(whole, workdir, functools.partial(poison, source, first, count))
    wrong = endings.wrong(done, {0})
    if not wrong:
        skipped = [r["train/skipped_steps"] for r in _records(workdir) if "train/loss" in r]
        expected = [min(max(step - first + 1, 0), count) for step in range(1, TRAIN_STEPS + 1)]
        if skipped != expected:
            wrong.append(f"skipped steps {skipped}, not {expected}")
    shutil.rmtree(workdir)
    return Result(f"{source} not finite", f"{count} in a row", wrong)


def endless(whole: Whole, workdir: Path, source: str, first: int) -> Result:
    """All steps from one on are bad: the run ends, and goes on as it says when it is mended."""
    done = _train(whole, workdir, functools.partial(poison, source, first, TRAIN_STEPS))
    wrong = endings.wrong(done, MISTAKE)
    wrong += _bad_batch(workdir, done)
    advice = "lower --config.optimizer.learning_rate and run the command again"
    begin = re.search(
        r"it resumes from (?:the checkpoint of step (\d+)|the beginning)", done.stderr
    )
    if advice not in done.stderr or not begin:
        wrong.append(f"it does not say how to go on: {endings.last_words(done)}")
    again = _train(whole, workdir, optimizer__learning_rate=1e-4)
    wrong += endings.wrong(again, {0})
    if begin and begin[1] and f"resuming from step {begin[1]}" not in again.stderr:
        wrong.append(f"it does not go on from step {begin[1]}: {again.stderr[: judge.SHORT]}")
    shutil.rmtree(workdir)
    return Result(f"{source} not finite", "from a step on", wrong)


def _bad_batch(workdir: Path, done: Done) -> list[str]:
    """Whether the batch of the first bad step lies where the message says."""
    path = re.search(r"its batch is (\S+\.npz)", done.stderr)
    if not path or not Path(path[1]).exists():
        return [f"the bad batch is not there: {endings.last_words(done)}"]
    arrays = np.load(path[1])
    missing = {"inputs", "targets", "weights"} - set(arrays)
    return [f"the bad batch has no {sorted(missing)}"] if missing else []


def _train(
    whole: Whole, workdir: Path, before: Callable[[], object] | None = None, **changes: object
) -> Done:
    if not workdir.exists():
        whole.lend_cache(workdir)
    given = {"max_skipped_steps": MOST_SKIPPED, **changes}
    return endings.end(whole.start(workdir, before, **given)[0])


def _records(workdir: Path) -> list[dict[str, Any]]:
    return judge.read_records(workdir)


# What is replaced in the process that trains ------------------------------------------------------


def poison(source: str, first: int, count: int) -> None:
    """Makes so many steps bad, from this one on."""
    replaced: dict[str, Callable[[int, int], None]] = {
        "batch": _poison_batches,
        "loss": functools.partial(_poison_step, _loss),
        "gradient": functools.partial(_poison_step, _first_gradient),
        "parameters": _poison_parameters,
    }
    replaced[source](first, count)


def _nan(array: jax.Array, bad: Any) -> jax.Array:
    return jnp.where(bad, jnp.nan, array)


def _first_gradient(loss: Any, grads: Any, bad: Any) -> tuple[Any, Any]:
    """One number of one gradient."""
    leaves, tree = jax.tree.flatten(grads)
    one = jnp.arange(leaves[0].size).reshape(leaves[0].shape) == 0
    return loss, jax.tree.unflatten(tree, [_nan(leaves[0], bad & one), *leaves[1:]])


def _poison_batches(first: int, count: int) -> None:
    """Weights of a batch are not a number."""
    right = trainer.train_batches

    def batches(stream, length, size, seed, rows=None, start=0):
        for step, batch in enumerate(right(stream, length, size, seed, rows, start), start + 1):
            bad = first <= step < first + count
            yield batch._replace(weights=batch.weights * np.float32(np.nan)) if bad else batch

    trainer.train_batches = batches  # type: ignore[assignment]


def _loss(values: tuple, grads: Any, bad: jax.Array) -> tuple[tuple, Any]:
    loss, aux = values
    return (_nan(loss, bad), aux), grads


def _poison_step(change: Callable, first: int, count: int) -> None:
    """Loss or gradients of a step."""
    right = steps.make_loss_and_grads

    def make(*arguments: Any):
        loss_and_grads = right(*arguments)

        def changed(params, batch, key, scale, step):
            bad = (step >= first - 1) & (step < first - 1 + count)
            return change(*loss_and_grads(params, batch, key, scale, step), bad)

        return changed

    steps.make_loss_and_grads = make  # type: ignore[assignment]


def _poison_parameters(first: int, count: int) -> None:
    """After a step, one parameter is not a number; others follow by themselves."""
    del count
    right = steps.make_train_step

    def make(*arguments: Any):
        step = right(*arguments)

        def changed(state, batch):
            state, metrics = step(state, batch)
            return (_with_nan(state, "params") if int(state.step) == first else state), metrics

        return changed

    steps.make_train_step = make  # type: ignore[assignment]


def _with_nan(state: steps.TrainState, part: str) -> steps.TrainState:
    """One number of a part of a state is not one."""
    leaves, tree = jax.tree.flatten(getattr(state, part))
    index = next(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
    array = np.array(leaves[index])
    array.flat[0] = np.nan
    leaves[index] = jax.device_put(array, leaves[index].sharding)
    return dataclasses.replace(state, **{part: jax.tree.unflatten(tree, leaves)})


# In checkpoints -----------------------------------------------------------------------------------


def saved(whole: Whole, workdir: Path, part: str, *, newest_only: bool) -> Result:
    """A checkpoint that is whole by its checksums and holds a number that is not one."""
    wanted = judge.read(whole.workdir)
    _train(whole, workdir, train_steps=3 * CHECKPOINT_EVERY)
    spoil(workdir, part, newest_only)
    done = _train(whole, workdir)
    wrong = endings.wrong(done, {0} if newest_only else MISTAKE)
    if newest_only and not wrong:
        if "is not used" not in done.stderr:
            wrong.append(f"no warning: {done.stderr[: judge.SHORT]}")
        wrong += judge.differences(wanted, judge.read(workdir))
    shutil.rmtree(workdir)
    which = "the newest checkpoint" if newest_only else "both checkpoints"
    return Result(f"{part} not finite", f"in {which}", wrong)


def sampled(whole: Whole, workdir: Path) -> Result:
    """The parameters that are to make text hold a number that is not one."""
    _train(whole, workdir, train_steps=3 * CHECKPOINT_EVERY)
    spoil(workdir, "params", newest_only=False)
    given = f"--workdir={workdir}", "--checkpoint=latest", "--prompt=the ", "--max_new_tokens=4"
    done = endings.end(Running("sample", *given, environment=environment(whole.corpus)))
    shutil.rmtree(workdir)
    return Result("params not finite", "sampling from it", endings.wrong(done, MISTAKE))


def spoil(workdir: Path, part: str, newest_only: bool) -> None:
    """Saves the latest states again, with a number that is not one."""
    config = load_config(workdir)
    model, mesh = create_model(config), sharding.make_mesh()
    optimizer = optimizers.create_optimizer(
        config.optimizer, config.train_steps, parameter_specs(model)
    )
    shapes = steps.abstract_state(model, optimizer, mesh)
    for step in judge.steps_saved(workdir, "latest")[-1 if newest_only else 0 :]:
        folder = workdir / "checkpoints/latest"
        for other in judge.steps_saved(workdir, "latest"):
            if other > step:
                (folder / str(other)).rename(folder / f"{other}.aside")
        with Checkpoints(workdir) as checkpoints:
            found = checkpoints.restore_latest(shapes)
            assert found is not None
            checkpoints.save_latest(step, _with_nan(found[0], part), found[1], prune=False)
        for aside in folder.glob("*.aside"):
            aside.rename(aside.with_suffix(""))


# The page -----------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    return [
        f"At most {MOST_SKIPPED} updates in a row may be left out here. As documented: fewer are "
        "left out and counted in `train/skipped_steps`; more end the run with exit code 2, the "
        "bad batch is kept, and the run goes on from where its message says, as it advises. A "
        "checkpoint that holds what is not a number is not used, with a warning.",
        "",
        *table(["what", "how often, or where", "tried", "as documented"], found["rows"]),
    ]
