"""Floating point operations of a model, from its configuration, and the peaks of known chips.

Only operations that the mathematics needs are counted: products with matrices, and half of the
causal square of attention. Nothing for what is computed again to save memory.
"""

import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nrgpt_jax.core.energies import ATTENTION, FEEDFORWARD
from nrgpt_jax.core.parameters import Sizes, Specs
from nrgpt_jax.models.names import NRGPT_PREFIX, is_nrgpt

# Dense bfloat16 operations a second of one device, by the start of its `device_kind`; makers'
# data sheets. The first match counts.
PEAKS: Mapping[str, float] = {
    "TPU v2": 22.5e12,  # a core; two cores a chip
    "TPU v3": 61.5e12,  # a core; two cores a chip
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,  # float16
    "Tesla T4": 65e12,  # float16
}


def train_flops_per_token(model: Mapping[str, Any]) -> float | None:
    """Operations a token of one training step: three times those of the forward pass.

    Each product of the forward pass has two in the backward pass. None for an attention energy
    that this module does not know.

    Args:
      model: `config.model`, with `vocab_size` set.
    """
    width, vocabulary, steps = model["embed_dim"], model["vocab_size"], model["num_steps"]
    step = _energy_step(model) if is_nrgpt(model["name"]) else _transformer_block(model)
    return None if step is None else 3.0 * (steps * step + 2 * width * vocabulary)


def _energy_step(model: Mapping[str, Any]) -> float | None:
    width, heads = model["embed_dim"], model["num_heads"]
    rank = model["head_dim"] or width // heads
    sizes = Sizes(width, heads, rank, model["mlp_ratio"] * width)
    if model["attention"] not in ("full_rank", "low_rank"):
        return None
    matrices = _matrix_elements(ATTENTION[model["attention"]].specs(sizes))
    # Keys once; low-rank queries there and back. Scores and averages: half of the square each.
    uses, score_width = (1, width) if model["attention"] == "full_rank" else (1.5, rank)
    attention = 2 * uses * matrices + 2 * model["context_length"] * heads * score_width
    # Every feed-forward matrix is used in the energy and, transposed, in its gradient.
    feedforward = 4 * _matrix_elements(
        FEEDFORWARD[model["name"].removeprefix(NRGPT_PREFIX)].specs(sizes)
    )
    rate = 2 * width**2 if model["rate"] in ("full", "psd") else 0
    return attention + feedforward + rate


def _transformer_block(model: Mapping[str, Any]) -> float:
    width, hidden = model["embed_dim"], model["mlp_ratio"] * model["embed_dim"]
    return 8 * width**2 + 2 * model["context_length"] * width + 4 * width * hidden


def _matrix_elements(specs: Specs) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values() if len(spec.shape) > 1)


def peak_flops() -> float | None:
    """Operations a second that all devices together can reach; None for an unknown chip.

    Chips are looked up in `PEAKS`; CPUs are measured, by a float32 product of 2048 x 2048.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_peak() * jax.process_count()
    for kind, peak in PEAKS.items():
        if device.device_kind.startswith(kind):
            return peak * jax.device_count()
    return None


@functools.cache
def _measured_cpu_peak(size: int = 2048, repeats: int = 5) -> float:
    """One product uses all cores, however many devices they are split into."""
    product = jax.jit(jnp.matmul)
    a = jax.device_put(jnp.full((size, size), 0.5, jnp.float32), jax.local_devices()[0])
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
