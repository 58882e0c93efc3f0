"""The fast rules are faster: ratios inside one process, both sides taking turns."""

import time

import jax
import jax.numpy as jnp

from nrgpt_jax.configs import default_config
from nrgpt_jax.models import create_model


def long_model(kernels):
    config = default_config().model
    config.update({"name": "NRGPT_H_FF2W", "vocab_size": 20, "embed_dim": 32, "num_heads": 2})
    config.update({"context_length": 1024, "num_steps": 2, "kernels": kernels})
    return create_model(config)


def training_gradient(model):
    tokens = jax.random.randint(jax.random.key(0), (2, 1024), 0, 20)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, tokens) ** 2)))
    return lambda: jax.block_until_ready(gradient(params))


def least_times(functions, rounds):
    """The least time of each: what noise there is only adds."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, own in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            own.append(time.perf_counter() - begin)
    return [min(own) for own in times]


def test_fused_rules_beat_plain_automatic_differentiation():
    fused, plain = least_times([training_gradient(long_model(k)) for k in ("fused", "plain")], 8)
    assert plain > 1.8 * fused, (plain, fused)  # 3.3 to 3.8 when quiet
