"""Cost of a token at equal parameters: FLOPs, time, memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import experiments.quality
from nrgpt_jax.configs import default_config
from nrgpt_jax.generation.generate import Settings, cache_bytes, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.models import abstract_params, create_model, num_parameters, sharding
from nrgpt_jax.models.flops import train_flops_per_token
from studies.measures import in_turns, training_step
from studies.tables import Columns, summary

MODELS = {  # in experiments/quality.py
    "GPT": "small_GPT_muon",
    "GPT_Rec_parallel": "small_GPT_Rec_parallel_muon",
    "NRGPT_H_FF2W": "small_full_muon",
    "FFG_rope": "small_low_rank_rope_FFG_muon",
}
ROUNDS, STEPS, NEW, TEXTS = 5, 10, 63, 16
COLUMNS: Columns = {
    "operations": ("forward operations per token", ",.0f"),
    "train_speed": ("training, tokens/s", ",.0f"),
    "memory": ("training, MB", ".1f"),
    "latency": ("1 text, ms per token", ".2f"),
    "speed": (f"{TEXTS} texts, tokens/s", ",.0f"),
    "cache": ("cache, bytes per token", ",.0f"),
}
Numbers = dict[str, float]


def measure() -> dict[str, Numbers]:
    """Measure every model: medians over interleaved rounds in this process."""
    configs = {name: config_of(name) for name in MODELS}
    prepared = {name: _ways(config) for name, config in configs.items()}
    ways = {(n, way): work for n, (_, own) in prepared.items() for way, work in own.items()}
    seconds = in_turns(ways, ROUNDS)
    return {
        name: {
            **counted(config),
            "memory": float(prepared[name][0]),
            "train_speed": STEPS * config.data.batch_size * (NEW + 1) / seconds[name, "train"],
            "latency": 1e3 * seconds[name, "one"] / NEW,
            "speed": TEXTS * NEW / seconds[name, "many"],
        }
        for name, config in configs.items()
    }


def config_of(name: str) -> ConfigDict:
    """Return the configuration of one of `MODELS`."""
    config = experiments.quality.get_config(MODELS[name])
    config.model.vocab_size, config.optimizer.accumulation_steps = 65, 1
    return config


def counted(config: ConfigDict) -> Numbers:
    """Count parameters, FLOPs per token of a forward pass, and KV cache bytes per token."""
    model, length = create_model(config), config.model.context_length
    return {
        "parameters": num_parameters(model),
        "operations": train_flops_per_token(model) / 3,
        "cache": cache_bytes(model, {"params": abstract_params(model)}, 1, length) / length,
    }


def _ways(config: ConfigDict) -> tuple[float, dict[str, Callable[[], Any]]]:
    """Return the temporary bytes of a training step in XLA's plan, and the calls to time: training
    steps, generation of one text, and of many."""
    shape = config.data.batch_size, config.model.context_length + 1
    tokens = np.random.default_rng(0).integers(0, 65, shape, np.int32)
    mesh = sharding.make_mesh(default_config().mesh)
    model, step, state, batch = training_step(config, mesh, tokens)
    planned = step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    variables = {"params": jax.tree.map(jax.numpy.copy, state.params)}

    def train():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        return metrics

    settings = Settings(Sampling(temperature=1.0))
    make = lambda n: generate(model, variables, [np.array([1])] * n, NEW, settings)
    return planned, {"train": train, "one": partial(make, 1), "many": partial(make, TEXTS)}


def lines(found: dict[str, Numbers]) -> list[str]:
    """Return a table with a row per model."""
    rows = {(f"`{n}`",): [{**row, "memory": row["memory"] / 1e6}] for n, row in found.items()}
    return summary(["model"], rows, COLUMNS)
