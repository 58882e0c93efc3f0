"""Training of runs that differ only in seed, data part and learning rate, as one program.

Small models leave an accelerator idle; `jax.vmap` over runs fills it. Batches, initial parameters,
optimizer, losses and random numbers are those of `nrgpt_jax.train` on one device, so the results
agree up to rounding. A run that `train` would end as diverged has no validation loss. There are no
checkpoints: each run directory is written at the end, as an export (`runs.pretrained`) with the
losses of all evaluations in its metrics.jsonl.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from nrgpt_jax.array_types import Batch
from nrgpt_jax.datasets import Dataset, load_dataset
from nrgpt_jax.datasets.pipeline import train_batches, validation_batches
from nrgpt_jax.datasets.streams import Stream
from nrgpt_jax.errors import require
from nrgpt_jax.models import LanguageModel, create_model, parameter_specs
from nrgpt_jax.runs.directory import locked
from nrgpt_jax.runs.metrics import FILE_NAME
from nrgpt_jax.runs.pretrained import Pretrained, save_pretrained
from nrgpt_jax.training import depths, losses
from nrgpt_jax.training.config_checks import check_config
from nrgpt_jax.training.loop import resolve
from nrgpt_jax.training.optimizers import create_optimizer
from nrgpt_jax.training.step import TrainState, initial_state, train_step
from nrgpt_jax.training.warm_start import folder_of, initial_params

CHUNK = 250  # largest number of training steps in one device call
VARIED = ("seed", "data.train_fraction", "optimizer.learning_rate", "optimizer.final_learning_rate")


class Source(NamedTuple):
    """The seed and training stream that determine the batches of a run."""

    seed: int
    train: Stream


class Runs(NamedTuple):
    """The states of S x R runs: every array has leading axes of S sources and R learning rates."""

    state: TrainState
    lost: jax.Array  # (S,R), whether too many updates in a row were skipped


class Evaluation(NamedTuple):
    """The losses of all runs, (S,R), in nats; NaN for diverged runs."""

    step: int
    train_loss: np.ndarray  # mean over the steps of the last device call
    validation_loss: np.ndarray


def train_side_by_side(
    config: ConfigDict, sources: Sequence[Source], rates: Sequence[float], dataset: Dataset
) -> tuple[Any, list[Evaluation]]:
    """Train one model with every source and every learning rate.

    Args:
      config: training configuration; its final learning rate is scaled with its learning rate.
      sources, rates: S sources and R learning rates.
      dataset: data set of the configuration, for validation.

    Returns:
      The parameters, (S,R,...) each, and all evaluations; the last is after the last step.
    """
    model, total = create_model(config), config.train_steps
    runs, advance_all = _program(model, config, sources, rates)
    if config.init_from:
        state: Any = runs.state
        params = _trained(config, sources, rates, model, dataset)
        runs = runs._replace(state=state.replace(params=params))
    validate, result = _validation(model, config, dataset), list[Evaluation]()
    step, begun = 0, time.monotonic()
    for batches in _chunks(config, sources):
        runs, train_loss = advance_all(runs, batches)
        step += len(batches.inputs)
        if step % config.eval_every == 0 or step == total:
            lost, observed = np.asarray(runs.lost), validate(runs.state.params)
            hidden = [np.where(lost, np.nan, loss) for loss in (train_loss, observed)]
            result.append(Evaluation(step, *hidden))
            lowest, highest = np.nanmin(hidden[1], initial=np.inf), np.nanmax(hidden[1], initial=0)
            said = f"{step} of {total} steps, {time.monotonic() - begun:.0f} s, validation losses"
            print(f"{said} {lowest:.4f} to {highest:.4f}", flush=True)
    return runs.state.params, result


def _program(
    model: LanguageModel, config: ConfigDict, sources: Sequence[Source], rates: Sequence[float]
) -> tuple[Runs, Callable[[Runs, Batch], tuple[Runs, jax.Array]]]:
    """Return the initial state of all runs, and a function that advances them by K batches."""
    depth, c = depths.of_config(config), config.optimizer.to_dict()
    rows, specs = jnp.arange(config.data.batch_size), parameter_specs(model)
    final = c["final_learning_rate"] / c["learning_rate"]
    seeds_S = jnp.asarray([source.seed for source in sources])
    rates_R = jnp.asarray(rates, jnp.float32)

    def optimizer_of(rate) -> optax.GradientTransformation:
        scaled = {**c, "learning_rate": rate, "final_learning_rate": final * rate}
        return create_optimizer(scaled, config.train_steps, specs)

    def loss_and_grads(params, batch: Batch, key, scale, step):
        arguments = model, batch, rows, key, scale, step, depth
        return jax.value_and_grad(losses.summed_loss, has_aux=True)(params, *arguments)

    def initial(seed, rate) -> Runs:
        return Runs(initial_state(model, optimizer_of(rate), seed), jnp.asarray(False))

    def one_step(run: Runs, batch: Batch, seed, rate) -> tuple[Runs, jax.Array]:
        state, metrics = train_step(run.state, batch, seed, optimizer_of(rate), loss_and_grads)
        lost = run.lost | (state.skipped_in_a_row >= config.max_skipped_steps)
        return Runs(state, lost), metrics["train/loss"]

    @partial(jax.jit, donate_argnums=0)
    def advance_all(runs: Runs, batches: Batch) -> tuple[Runs, jax.Array]:
        of_rate = jax.vmap(one_step, (0, None, None, 0))
        of_source = jax.vmap(of_rate, (0, 0, 0, None))
        runs, observed = jax.lax.scan(lambda r, b: of_source(r, b, seeds_S, rates_R), runs, batches)
        return runs, jnp.mean(observed, axis=0)

    begin = jax.jit(jax.vmap(jax.vmap(initial, (None, 0)), (0, None)))
    return begin(seeds_S, rates_R), advance_all


def _trained(
    config: ConfigDict,
    sources: Sequence[Source],
    rates: Sequence[float],
    model: LanguageModel,
    dataset: Dataset,
) -> Any:
    """Load the initial parameters (S,R,...) from the `init_from` model of every source."""
    folder = lambda source: folder_of(config.init_from, source.seed, Path())
    of = lambda source: initial_params(folder(source), model, dataset.tokenizer)
    of_sources = jax.tree.map(lambda *leaves: np.stack(leaves), *map(of, sources))
    of_rates = lambda leaf: jnp.repeat(leaf[:, None], len(rates), axis=1)
    return jax.tree.map(of_rates, of_sources)


def _chunks(config: ConfigDict, sources: Sequence[Source]) -> Iterator[Batch]:
    """Yield the batches (K,S,B,N) of all sources for K steps; evaluations follow whole chunks."""
    fields = config.model.context_length, config.data.batch_size
    streams = [train_batches(source.train, *fields, source.seed) for source in sources]
    together = lambda arrays: np.stack(list(arrays))
    longest = min(CHUNK, config.eval_every)
    size = next(n for n in range(longest, 0, -1) if config.eval_every % n == 0)
    for start in range(0, config.train_steps, size):
        count = min(size, config.train_steps - start)
        steps = [[next(stream) for stream in streams] for _ in range(count)]
        of_sources = [Batch(*map(together, zip(*step, strict=True))) for step in steps]
        yield Batch(*map(together, zip(*of_sources, strict=True)))


def _validation(model, config: ConfigDict, dataset: Dataset):
    """Return a function `parameters (S,R,...) -> losses (S,R)` over the validation windows."""
    of_run = lambda params, batch: losses.batch_sums(params, model, batch)
    sums = jax.jit(jax.vmap(jax.vmap(of_run, (0, None)), (0, None)))
    length, limit = config.model.context_length, config.eval_windows

    def validate(params: Any) -> np.ndarray:
        windows = validation_batches(dataset.validation, length, config.data.batch_size, limit)
        result = [sums(params, batch) for batch in windows]
        total = {name: sum(np.asarray(p[name]) for p in result) for name in ("loss", "weights")}
        return np.asarray(total["loss"] / total["weights"])

    return validate


def groups(configs: Mapping[Path, ConfigDict]) -> list[dict[Path, ConfigDict]]:
    """Group runs whose configurations agree in all fields but those that may vary side by side."""
    result: dict[str, dict[Path, ConfigDict]] = {}
    for workdir, config in configs.items():
        same = config.copy_and_resolve_references()
        c = same.optimizer
        ratio = c.final_learning_rate / c.learning_rate  # the same for all rates of a group
        same.update_from_flattened_dict(dict.fromkeys(VARIED, 0))
        same.init_from = _of_workdir(config.init_from, workdir)
        result.setdefault(f"{same.to_json()} {ratio:.6g}", {})[workdir] = config
    return list(result.values())


def _of_workdir(init_from: str, workdir: Path) -> str:
    """Return `init_from` as a resolved path with {workdir} filled in; {seed} stays."""
    return str(folder_of(init_from, "{seed}", workdir).resolve()) if init_from else ""


def train_directories(configs: Mapping[Path, ConfigDict]) -> None:
    """Train the configurations of one of the `groups`, and write each to its run directory.

    Every seed and data part is trained with every learning rate, also in combinations that are not
    in `configs`.

    Raises:
      UserError: a setting is invalid, or unsupported side by side.
    """
    source_of = lambda config: (config.seed, config.data.train_fraction)
    config = next(iter(configs.values())).copy_and_resolve_references()
    keys = sorted({source_of(run_config) for run_config in configs.values()})
    rates = sorted({run_config.optimizer.learning_rate for run_config in configs.values()})
    check_config(config, 1)
    require(config.spike_factor == 0, "spike_factor", config.spike_factor, "0 side by side")
    require(not config.evaluators, "evaluators", config.evaluators, "() side by side")
    schedule, allowed = config.optimizer.schedule, "cosine or constant side by side"
    require(schedule != "exponential", "optimizer.schedule", schedule, allowed)
    dataset = resolve(config)
    config.init_from = _of_workdir(config.init_from, next(iter(configs)))
    part = lambda share: load_dataset({**config.data, "train_fraction": share}).train
    parts = {share: part(share) for share in {share for _, share in keys}}
    sources = [Source(seed, parts[share]) for seed, share in keys]
    with contextlib.ExitStack() as folders_locked:
        for workdir in configs:
            folders_locked.enter_context(locked(workdir))
        params, result = train_side_by_side(config, sources, rates, dataset)
        for workdir, arguments in configs.items():
            at = keys.index(source_of(arguments)), rates.index(arguments.optimizer.learning_rate)
            variant = arguments.copy_and_resolve_references()
            resolved = config.copy_and_resolve_references()
            variant.model.vocab_size, variant.data = resolved.model.vocab_size, resolved.data
            variant.data.train_fraction = arguments.data.train_fraction
            of_run = jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at]), params)
            pretrained = Pretrained(
                create_model(variant), {"params": of_run}, dataset.tokenizer, variant
            )
            save_pretrained(workdir, pretrained)
            lines = [json.dumps(_line(evaluation, at)) for evaluation in result]
            (workdir / FILE_NAME).write_text("\n".join(lines) + "\n")


def _line(evaluation: Evaluation, at: tuple[int, int]) -> dict[str, float | None]:
    number = lambda losses: float(losses[at]) if math.isfinite(losses[at]) else None
    observed = {"train/loss": evaluation.train_loss, "val/loss": evaluation.validation_loss}
    return {"step": evaluation.step, **{name: number(losses) for name, losses in observed.items()}}
