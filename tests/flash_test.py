"""Attention by the kernels of accelerators: the same as the blocked rule, forward and backward."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from marks import slow, slow_but

from nrgpt_jax.array_types import Batch
from nrgpt_jax.configs import default_config
from nrgpt_jax.models import create_model, sharding
from nrgpt_jax.ops import attention, flash
from nrgpt_jax.training import evaluation, step

pytestmark = pytest.mark.ci

LENGTH = 256
KERNELS = {
    "dot_product": partial(flash.dot_product, implementation="xla"),  # the call that cuDNN gets
    "splash": partial(flash.splash, interpret=True),
}


def inputs(groups, heads, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (groups, LENGTH, 8), dtype)
    key = jax.random.normal(keys[1], (groups, heads, LENGTH, 8), dtype)
    weight = jax.random.normal(keys[2], (groups, heads, LENGTH))
    return (query, key, weight), jax.random.normal(keys[3], query.shape)


def blocked(strict, query, keys, weight):
    return attention.attend(query, keys, weight, strict=strict, use_device=False)


def value_and_gradients(function, arguments, cotangent):
    loss = lambda *args: jnp.sum(function(*args).astype(jnp.float32) * cotangent)
    return jax.jit(lambda *args: (function(*args), jax.grad(loss, (0, 1, 2))(*args)))(*arguments)


@pytest.mark.parametrize(
    ("groups", "heads", "strict"),
    [(3, 1, True), (1, 2, False), slow(3, 1, False), slow(1, 2, True)],
)
@pytest.mark.parametrize("name", KERNELS)
def test_equals_the_blocked_rule(name, groups, heads, strict, standard_promotion):
    del standard_promotion
    arguments, cotangent = inputs(groups, heads)
    found = value_and_gradients(
        lambda q, k, w: flash.attend_with(KERNELS[name], q, k, w, strict), arguments, cotangent
    )
    wanted = value_and_gradients(partial(blocked, strict), arguments, cotangent)
    chex.assert_trees_all_close(found, wanted, atol=2e-4)


def small_model(**fields):
    config = default_config().model
    config.update({"name": "NRGPT_H_FF2W", "vocab_size": 11, "embed_dim": 16, "num_heads": 2})
    config.update({"attention": "low_rank", "context_length": LENGTH, "num_steps": 2, **fields})
    return create_model(config)


def training(model):
    """Shapes of parameters and tokens, and the gradient of a loss."""
    tokens = jax.ShapeDtypeStruct((4, LENGTH), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return params, tokens, jax.grad(lambda p, tokens: jnp.sum(model.apply(p, tokens) ** 2))


@pytest.mark.parametrize(
    ("mask", "dtype"), [slow("strict", "float32"), ("inclusive", "bfloat16")], ids=str
)
def test_training_lowers_for_tpus_with_their_kernel(mask, dtype, monkeypatch, standard_promotion):
    """Compiled as far as one can without the chip."""
    del standard_promotion
    monkeypatch.setattr(flash, "_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    params, tokens, gradient = training(small_model(mask=mask, dtype=dtype))
    exported = jax.export.export(jax.jit(gradient), platforms=["tpu"])(params, tokens)
    assert "tpu_custom_call" in exported.mlir_module()
    assert "pallas_call" in str(jax.make_jaxpr(gradient)(params, tokens))
    blocked = training(small_model(mask=mask, dtype=dtype, implementation="blocked"))[2]
    assert "pallas_call" not in str(jax.make_jaxpr(blocked)(params, tokens))


def test_on_several_tpus_the_kernel_is_inside_shard_map_only(monkeypatch, standard_promotion):
    del standard_promotion
    monkeypatch.setattr(flash, "_backend", lambda: "tpu")
    (params, tokens, gradient), mesh = training(small_model()), sharding.make_mesh()
    split = (sharding.replicated(mesh), sharding.batch_sharding(mesh))
    whole = jax.jit(gradient, in_shardings=split)
    specs = (P(), P(sharding.BATCH_AXES))
    inside = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    for function, expected in ((whole, False), (jax.jit(inside, in_shardings=split), True)):
        exported = jax.export.export(function, platforms=["tpu"])(params, tokens)
        assert ("tpu_custom_call" in exported.mlir_module()) == expected


MESHES = [(2, 1, 1), slow((1, 2, 1)), (1, 1, 2)]


@pytest.mark.parametrize("lengths", MESHES)
def test_training_and_evaluation_on_several_tpus_use_it_with_a_batch_in_one_part(
    lengths, monkeypatch, standard_promotion
):
    del standard_promotion
    monkeypatch.setattr(flash, "_backend", lambda: "tpu")
    model = small_model(vocab_size=12)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, lengths, strict=True)))
    optimizer = optax.sgd(1e-3)
    state = jax.eval_shape(lambda: step.create_state(model, optimizer, 0, mesh))
    shapes: list[Any] = [
        jax.ShapeDtypeStruct((4, LENGTH), t) for t in ("int32", "int32", "float32")
    ]
    train_step: Any = step.make_train_step(model, optimizer, 0, 1, mesh)
    eval_step: Any = evaluation.make_eval_step(model, mesh)
    for function, first in ((train_step, state), (eval_step, state.params)):
        exported = jax.export.export(function, platforms=["tpu"])(first, Batch(*shapes))
        assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize("attention", slow_but([], ["low_rank", "full_rank"]))
def test_heads_split_over_devices_give_the_same_loss_and_gradients(
    attention, monkeypatch, standard_promotion
):
    del standard_promotion
    model = small_model(vocab_size=12, attention=attention)
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH) % 11
    batch = Batch(*map(np.asarray, (tokens, tokens + 1, jnp.ones(tokens.shape))))
    found: dict[int, Any] = {}
    heads: list[int] = []

    def take(backend, count, *shape):
        heads.append(count)
        return KERNELS["dot_product"]

    for tensor in (1, 2):
        if tensor == 2:
            monkeypatch.setattr(flash, "kernel_for", take)
        mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": tensor})
        params = step.create_state(model, optax.sgd(1.0), 0, mesh).params
        loss_and_grads = jax.jit(step.make_loss_and_grads(model, 1, mesh))
        args = params, sharding.put_batch(batch, mesh), jax.random.key(0), 1e-3, 0
        found[tensor] = jax.tree.map(np.asarray, loss_and_grads(*args))
    assert set(heads) == {1}, "each device has one of two heads"
    chex.assert_trees_all_close(found[2], found[1], atol=2e-4)


def test_what_no_kernel_takes_goes_the_blocked_way():
    (query, key, weight), _ = inputs(1, 2)
    assert flash.attend(query, key, weight, False) is None, "a CPU has none"
    assert flash.kernel_for("tpu", 4, 100, 64, "bfloat16") is None
    assert flash.kernel_for("tpu", 4, 128, 768, "bfloat16") is None
    assert flash.kernel_for("tpu", 4, 128, 64, "bfloat16") is not None


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU and JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("strict", [True, False])
def test_cudnn(strict):
    arguments, cotangent = inputs(4, 1, jnp.bfloat16)
    assert flash.kernel_for("gpu", 4, LENGTH, 8, "bfloat16") is flash.dot_product
    outputs = {}
    for use_device in (True, False):
        outputs[use_device] = value_and_gradients(
            partial(attention.attend, strict=strict, use_device=use_device), arguments, cotangent
        )
    for a, b in zip(*map(jax.tree.leaves, outputs.values()), strict=True):
        error = jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype("float32"))
        assert float(error) < 0.02
