"""FLOPs of a model, from its parameter tables, and the peak FLOP/s of known devices.

Only operations that the mathematics needs are counted: matrix products, and half of the causal
square of attention. Rematerialization is not counted.
"""

import functools
import math
import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nrgpt_jax.core.parameters import ParameterSpec, Table
from nrgpt_jax.models.language_model import LanguageModel

# Dense bfloat16 FLOP/s of one device by the prefix of its `device_kind`, from vendors' data sheets.
# The first match counts.
PEAKS: Mapping[str, float] = {
    "TPU v2": 22.5e12,  # per core; two cores per chip
    "TPU v3": 61.5e12,  # per core; two cores per chip
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,  # float16
    "Tesla T4": 65e12,  # float16
}


def train_flops_per_token(model: LanguageModel) -> float:
    """Return the FLOPs per token of one training step: three times those of the forward pass.

    Each product of the forward pass has two in the backward pass.
    """
    step = _products(model.block_table(), model) + model.pair_flops()
    head = 2 * model.embed_dim * model.vocab_size  # tied or not
    return 3.0 * (model.num_steps * step + head)


def _products(table: Table, model: LanguageModel) -> float:
    """Count a multiplication and an addition for every element and every use of a matrix."""
    total = 0.0
    for spec in table.values():
        if isinstance(spec, ParameterSpec):
            total += 2.0 * spec.uses * math.prod(spec.shape(model.sizes))
        else:
            total += _products(spec, model)
    return total


def peak_flops() -> float | None:
    """Return the peak FLOP/s of all devices together; None for an unknown device.

    Devices are looked up in `PEAKS`; CPUs are measured by a float32 product of 2048 x 2048.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_peak() * jax.process_count()
    for kind, peak in PEAKS.items():
        if re.match(rf"{kind}\b", device.device_kind):
            return peak * jax.device_count()
    return None


@functools.cache
def _measured_cpu_peak(size: int = 2048, repeats: int = 5) -> float:
    """Measure one product, which uses all cores for any number of JAX devices."""
    product = jax.jit(jnp.matmul)
    a = jax.device_put(jnp.full((size, size), 0.5, jnp.float32), jax.local_devices()[0])
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
