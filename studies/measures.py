"""Measurements of a model that several studies and benchmarks share."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from nrgpt_jax.array_types import Batch
from nrgpt_jax.datasets import Dataset, Prompts, Stream
from nrgpt_jax.datasets.pipeline import validation_batches
from nrgpt_jax.generation.generate import Settings
from nrgpt_jax.models import LanguageModel, create_model, parameter_specs, sharding
from nrgpt_jax.runs.pretrained import Pretrained
from nrgpt_jax.training import evaluation, optimizers
from nrgpt_jax.training import step as training

Way = TypeVar("Way")


def excerpts(stream: Stream, count: int, length: int) -> np.ndarray:
    """Return evenly spaced excerpts of a stream: tokens (count,length), int32."""
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    return stream.tokens[starts[:, None] + np.arange(length)]


def losses_at(
    trained: Pretrained, dataset: Dataset, depths: Iterable[int], windows: int
) -> dict[str, float]:
    """Compute the validation loss in nats (`loss_at_2T`) and the next-token accuracy (`hits_at_2T`)
    at multiples of the trained number of steps, over windows of the validation split."""
    mesh, found = sharding.make_mesh(), {}
    for times in depths:
        steps = times * trained.model.num_steps
        model, variables = trained.model.with_num_steps(trained.variables, steps)
        batches = validation_batches(dataset.validation, model.context_length, 64, windows)
        step = evaluation.make_eval_step(model, mesh, num_symbols=dataset.tokenizer.size)
        means = evaluation.evaluate_loss(step, variables["params"], batches, mesh)
        found[f"loss_at_{times}T"] = means["val/loss"]
        found[f"hits_at_{times}T"] = means["val/token_accuracy"]
    return found


def answered(
    trained: Pretrained, prompts: Prompts, limit: int | None = None, **settings: Any
) -> tuple[float, np.ndarray]:
    """Return the share of the first `limit` prompts answered and the steps of every generated
    token. Decoding is greedy unless `settings`, fields of `Settings`, change it."""
    model, params, options = trained.model, trained.variables["params"], Settings(**settings)
    made = evaluation.continuations(model, params, prompts, limit=limit, settings=options)
    hits = evaluation.scores(made, prompts, model.context_length)
    return float(np.mean(hits)), np.concatenate([new.steps for new in made])


def in_turns(ways: Mapping[Way, Callable[[], Any]], rounds: int) -> dict[Way, float]:
    """Return the median seconds per call of interleaved calls; a first round compiles, untimed."""
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(1 + rounds):
        for way, work in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(work())
            times[way].append(time.perf_counter() - begin)
    return {way: statistics.median(seconds[1:]) for way, seconds in times.items()}


def training_step(
    config: ConfigDict, mesh: jax.sharding.Mesh, tokens: np.ndarray | None = None
) -> tuple[LanguageModel, Any, training.TrainState, Batch]:
    """Return the model of a configuration, its training step, and the state and batch to call it
    with. The batch holds `tokens` (B,N+1); if None, state and batch are shapes only."""
    model, parts = create_model(config), config.optimizer.accumulation_steps
    specs = parameter_specs(model)
    optimizer = optimizers.create_optimizer(config.optimizer, config.train_steps, specs)
    function = training.make_train_step(model, optimizer, 0, parts, mesh)
    create = lambda: training.create_state(model, optimizer, 0, mesh)
    if tokens is None:
        shape = config.data.batch_size, config.model.context_length
        types: Any = [jax.ShapeDtypeStruct(shape, t) for t in ("int32", "int32", "float32")]
        return model, function, jax.eval_shape(create), Batch(*types)
    weights = np.ones(tokens[:, 1:].shape, np.float32)
    batch = sharding.put_batch(Batch(tokens[:, :-1], tokens[:, 1:], weights), mesh)
    return model, function, create(), batch
