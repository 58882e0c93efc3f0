"""What a token costs at equal parameters: operations, time, memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import experiments.quality
from nrgpt_jax.array_types import Batch
from nrgpt_jax.configs import default_config
from nrgpt_jax.generation.generate import Settings, cache_bytes, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.models import (
    abstract_params,
    create_model,
    num_parameters,
    parameter_specs,
    sharding,
)
from nrgpt_jax.models.flops import train_flops_per_token
from nrgpt_jax.training import step as steps
from nrgpt_jax.training.optimizers import create_optimizer
from studies.tables import table

MODELS = {  # in experiments/quality.py
    "GPT": "small_GPT_muon",
    "GPT_Rec_parallel": "small_GPT_Rec_parallel_muon",
    "NRGPT_H_FF2W": "small_full_muon",
    "FFG_rope": "small_low_rank_rope_FFG_muon",
}
ROUNDS, STEPS, NEW = 5, 10, 63
Numbers = dict[str, float]


def measure() -> dict[str, Numbers]:
    """Of every model, the medians of rounds in which they take turns in this process."""
    times = dict[str, dict[str, list[float]]]()
    found = {n: {**counted(c), "memory": memory(c)} for n in MODELS for c in [config_of(n)]}
    ways = {name: _ways(config_of(name)) for name in MODELS}
    for number in range(1 + ROUNDS):
        for name, own in ways.items():
            for way, work in own.items():
                begin = time.perf_counter()
                jax.block_until_ready(work())
                if number:  # the first compiles
                    taken = time.perf_counter() - begin
                    times.setdefault(name, {}).setdefault(way, []).append(taken)
    for name, own_times in times.items():
        batch = config_of(name).data.batch_size
        median = {way: statistics.median(seconds) for way, seconds in own_times.items()}
        found[name]["train_speed"] = STEPS * batch * (NEW + 1) / median["train"]
        found[name]["latency"] = 1e3 * median["one"] / NEW
        found[name]["speed"] = 16 * NEW / median["sixteen"]
    return found


def config_of(name: str) -> ConfigDict:
    """The configuration of one of `MODELS`."""
    config = experiments.quality.get_config(MODELS[name])
    config.model.vocab_size = 65
    return config


def counted(config: ConfigDict) -> Numbers:
    """What needs no clock: parameters, operations of a forward pass, bytes of the cache a token."""
    model, length = create_model(config), config.model.context_length
    operations = train_flops_per_token(model)
    return {
        "parameters": num_parameters(model),
        "operations": operations / 3,
        "cache": cache_bytes(model, {"params": abstract_params(model)}, 1, length) / length,
    }


class _Step(NamedTuple):
    """A training step and what it is called with."""

    function: Any
    state: steps.TrainState
    batch: Batch


def _training_step(config: ConfigDict) -> _Step:
    model, mesh = create_model(config), sharding.make_mesh(default_config().mesh)
    optimizer = create_optimizer(config.optimizer, config.train_steps, parameter_specs(model))
    shape = config.data.batch_size, config.model.context_length
    tokens = np.random.default_rng(0).integers(0, 65, shape, np.int32)
    batch = sharding.put_batch(Batch(tokens, tokens, np.ones(shape, np.float32)), mesh)
    function = steps.make_train_step(model, optimizer, 0, 1, mesh)
    return _Step(function, steps.create_state(model, optimizer, 0, mesh), batch)


def memory(config: ConfigDict) -> float:
    """Bytes that a training step needs besides its state, as XLA has planned it."""
    step = _training_step(config)
    planned = step.function.lower(step.state, step.batch).compile().memory_analysis()
    return float(planned.temp_size_in_bytes)


def _ways(config: ConfigDict) -> dict[str, Callable[[], Any]]:
    """What is timed: training steps, one text, and sixteen."""
    model, (train_step, state, batch) = create_model(config), _training_step(config)
    held, variables = [state], {"params": jax.tree.map(jax.numpy.copy, state.params)}

    def train():
        for _ in range(STEPS):
            held[0], metrics = train_step(held[0], batch)
        return metrics

    settings = Settings(Sampling(temperature=1.0))
    make = lambda count: generate(model, variables, [np.array([1])] * count, NEW, settings)
    return {"train": train, "one": lambda: make(1), "sixteen": lambda: make(16)}


def lines(found: dict[str, Numbers]) -> list[str]:
    """A row for each model."""
    head = ["model", "parameters", "forward operations a token", "training, tokens/s"]
    head += ["training, MB", "one text, ms a token", "16 texts, tokens/s", "cache, bytes a token"]
    rows = [
        [
            f"`{name}`",
            f"{row['parameters']:,.0f}",
            f"{row['operations']:,.0f}",
            f"{row['train_speed']:,.0f}",
            f"{row['memory'] / 1e6:.1f}",
            f"{row['latency']:.2f}",
            f"{row['speed']:,.0f}",
            f"{row['cache']:,.0f}",
        ]
        for name, row in found.items()
    ]
    return table(head, rows)
