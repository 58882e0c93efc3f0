"""Trains runs that differ in seed and learning rate alone side by side, as one program.

Small models leave an accelerator idle; `jax.vmap` over runs fills it. Batches, initial parameters,
optimizer, losses and random numbers are those of `nrgpt_jax.train` on one device, so that a run
ends where that one would, but for rounding; one that would have ended as diverged has no validation
loss. There are no checkpoints: a run directory is written at the end, as an export
(`runs.pretrained`) with the last validation loss in its metrics.jsonl.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from nrgpt_jax.datasets import Dataset
from nrgpt_jax.datasets.pipeline import Batch, train_batches, validation_batches
from nrgpt_jax.errors import require
from nrgpt_jax.models import create_model, parameter_specs
from nrgpt_jax.runs.metrics import FILE_NAME
from nrgpt_jax.runs.pretrained import Pretrained, save_pretrained
from nrgpt_jax.training import depths, losses
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.loop import resolve
from nrgpt_jax.training.optimizers import create_optimizer
from nrgpt_jax.training.step import TrainState, advance, initial_state

CHUNK = 250  # training steps between two visits of the host


class Runs(NamedTuple):
    """Of S seeds and R learning rates, in front of every array."""

    state: TrainState
    lost: jax.Array  # whether too many steps in a row were skipped


def train_side_by_side(
    config: ConfigDict, seeds: Sequence[int], rates: Sequence[float], dataset: Dataset
) -> tuple[Any, np.ndarray]:
    """Trains one model with every seed and every learning rate.

    Args:
      config: of a training; its learning rates are scaled as one.
      seeds, rates: S and R of them.
      dataset: of the configuration.

    Returns:
      The parameters, (S,R,...) each, and the validation losses (S,R) in nats, NaN of those that
      diverged.
    """
    model, total = create_model(config), config.train_steps
    depth, c = depths.of_config(config), config.optimizer.to_dict()
    rows, specs = jnp.arange(config.data.batch_size), parameter_specs(model)
    final = c["final_learning_rate"] / c["learning_rate"]

    def optimizer_of(rate) -> optax.GradientTransformation:
        scaled = {**c, "learning_rate": rate, "final_learning_rate": final * rate}
        return create_optimizer(scaled, total, specs)

    def loss_and_grads(params, batch: Batch, key, scale, step):
        given = model, batch, rows, key, scale, step, depth
        return jax.value_and_grad(losses.summed_loss)(params, *given)

    def initial(seed, rate) -> Runs:
        return Runs(initial_state(model, optimizer_of(rate), seed), jnp.asarray(False))

    def one_step(run: Runs, batch: Batch, seed, rate) -> Runs:
        state, _ = advance(run.state, batch, seed, optimizer_of(rate), loss_and_grads)
        return Runs(state, run.lost | (state.skipped_in_a_row >= config.max_skipped_steps))

    @partial(jax.jit, donate_argnums=0)
    def chunk(runs: Runs, batches: Batch) -> Runs:
        of_rate = jax.vmap(one_step, (0, None, None, 0))
        of_seed = jax.vmap(of_rate, (0, 0, 0, None))
        step = lambda runs, batch: (of_seed(runs, batch, seeds_S, rates_R), None)
        return jax.lax.scan(step, runs, batches)[0]

    seeds_S, rates_R = jnp.asarray(seeds), jnp.asarray(rates, jnp.float32)
    runs = jax.jit(jax.vmap(jax.vmap(initial, (None, 0)), (0, None)))(seeds_S, rates_R)
    begun, waiting = time.monotonic(), runs.lost
    for number, batches in enumerate(_chunks(config, seeds, dataset)):
        waiting, ended = runs.lost.sum(), int(waiting.sum())  # waits for the chunk before only
        said = f"{number * CHUNK} of {total} steps, {ended} runs lost"
        print(f"{said}, {time.monotonic() - begun:.0f} s", flush=True)
        runs = chunk(runs, batches)
    found = _validation_losses(model, config, dataset, runs.state.params)
    return runs.state.params, np.where(np.asarray(runs.lost), np.nan, found)


def _chunks(config: ConfigDict, seeds: Sequence[int], dataset: Dataset) -> Iterator[Batch]:
    """The batches of all seeds: (K,S,B,N) for K steps."""
    fields = config.model.context_length, config.data.batch_size
    streams = [train_batches(dataset.train, *fields, seed) for seed in seeds]
    together = lambda arrays: np.stack(list(arrays))
    for start in range(0, config.train_steps, CHUNK):
        count = min(CHUNK, config.train_steps - start)
        steps = [[next(stream) for stream in streams] for _ in range(count)]
        of_seeds = [Batch(*map(together, zip(*step, strict=True))) for step in steps]
        yield Batch(*map(together, zip(*of_seeds, strict=True)))


def _validation_losses(model, config: ConfigDict, dataset: Dataset, params: Any) -> np.ndarray:
    sums = jax.jit(
        jax.vmap(
            jax.vmap(lambda params, batch: losses.batch_sums(params, model, batch), (0, None)),
            (0, None),
        )
    )
    length, most = config.model.context_length, config.eval_windows
    windows = validation_batches(dataset.validation, length, config.data.batch_size, most)
    found = [jax.tree.map(np.asarray, sums(params, batch)) for batch in windows]
    total = {name: sum(part[name] for part in found) for name in ("loss", "weights")}
    return np.asarray(total["loss"] / total["weights"])


def train_directories(config: ConfigDict, workdirs: dict[tuple[int, float], Path]) -> None:
    """Trains a configuration with each (seed, learning rate), and writes each to its directory.

    All the seeds are trained with all the rates.

    Raises:
      UserError: a setting is not possible side by side, or at all.
    """
    seeds = sorted({seed for seed, _ in workdirs})
    rates = sorted({rate for _, rate in workdirs})
    check_config(config, 1)
    require(config.spike_factor == 0, "spike_factor", config.spike_factor, "0 side by side")
    schedule, allowed = config.optimizer.schedule, "cosine or constant side by side"
    require(schedule != "exponential", "optimizer.schedule", schedule, allowed)
    dataset = resolve(config)
    params, found = train_side_by_side(config, seeds, rates, dataset)
    final = config.optimizer.final_learning_rate / config.optimizer.learning_rate
    for (seed, rate), workdir in workdirs.items():
        at = seeds.index(seed), rates.index(rate)
        own = config.copy_and_resolve_references()
        own.seed, own.optimizer.learning_rate = seed, rate
        own.optimizer.final_learning_rate = final * rate
        of_run = jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at]), params)
        pretrained = Pretrained(create_model(own), {"params": of_run}, dataset.tokenizer, own)
        save_pretrained(workdir, pretrained)
        loss = float(found[at])
        line = {"step": own.train_steps, "val/loss": loss if math.isfinite(loss) else None}
        (workdir / FILE_NAME).write_text(json.dumps(line) + "\n")
