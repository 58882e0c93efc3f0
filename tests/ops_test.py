"""Operations and whole models by any implementation: the same numbers, less memory."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import small_model as drawn_model
from marks import slow

from nrgpt_jax import ops
from nrgpt_jax.configs import default_config
from nrgpt_jax.models import create_model
from nrgpt_jax.ops import IMPLEMENTATIONS, log_sum_exp


@partial(jax.jit, static_argnums=2)
def aligned(query, keys, strict=False):
    """Of queries and keys (B,N,H,E) of the same tokens."""
    position = jnp.broadcast_to(jnp.arange(query.shape[1])[None], query.shape[:2])
    return log_sum_exp(query, keys, position, strict=strict, aligned=True)


@pytest.mark.parametrize("strict", [True, False])
def test_the_first_of_many_keys_are_as_aligned_ones(strict):
    """A cache that is not full; and a shared query or key is one of every head."""
    of_query, of_keys = jax.random.split(jax.random.key(0))
    query = jax.random.normal(of_query, (2, 100, 4))
    keys = jax.random.normal(of_keys, (2, 100, 3, 4))
    each = jnp.broadcast_to(query[:, :, None], keys.shape)
    expected = aligned(query, keys, strict)
    chex.assert_trees_all_close(aligned(each, keys, strict), expected, atol=1e-5)
    shared, repeated = aligned(each, query, strict), aligned(each, each, strict)
    chex.assert_trees_all_close(shared, repeated, atol=1e-5)
    slots = jnp.pad(keys, ((0, 0), (0, 28), (0, 0), (0, 0)), constant_values=7.0)
    of_slots = jax.jit(partial(log_sum_exp, strict=strict))
    for at in (0, 5, 99):
        one = of_slots(query[:, at : at + 1], slots, jnp.full((2, 1), at))
        chex.assert_trees_all_close(one[:, 0], expected[:, at], atol=1e-5)


def test_weights_of_a_row_far_above_the_others_do_not_overflow():
    query, keys = 100.0 * jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4))
    value, gradient = jax.jit(jax.value_and_grad(lambda q: jnp.sum(aligned(q, keys))))(query)
    np.testing.assert_allclose(value, 1200.0 + np.log(6.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.ones_like(query), rtol=1e-5)


def test_bfloat16_attention():
    query = jax.random.normal(jax.random.key(0), (1, 100, 8), jnp.bfloat16)
    keys = jax.random.normal(jax.random.key(1), (1, 100, 2, 8), jnp.bfloat16)

    def slope(query, keys):
        return jax.grad(lambda q: jnp.sum(aligned(q, keys)))(query)

    outer = jax.grad(lambda q, k: jnp.sum(slope(q, k).astype(jnp.float32) ** 2), (0, 1))
    for function in (jax.jit(lambda q, k: (slope(q, k),)), jax.jit(outer)):
        rough = function(query, keys)
        exact = function(query.astype(jnp.float32), keys.astype(jnp.float32))
        for a, b in zip(rough, exact, strict=True):
            assert a.dtype == jnp.bfloat16
            error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
            assert float(error) < 0.02


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_energies_of_a_bfloat16_model_keep_their_small_changes(implementation):
    """Near |E| = 300 a unit of bfloat16 is 2; energies are added up in float32."""
    fields = {"dtype": "bfloat16", "num_steps": 2, "embed_dim": 64}
    fields |= {"name": "NRGPT_H_FF1", "implementation": implementation}
    model, variables = drawn_model(**fields)
    feedforward = variables["params"]["block"]["feedforward"]
    feedforward["scale"] = feedforward["scale"] * 100.0
    tokens = jnp.arange(12)[None] % 11
    energies = jax.jit(lambda v: model.apply(v, tokens, method="energies"))(variables)
    for name, values in energies.items():
        assert values.dtype == jnp.float32, name
    values = energies["feedforward"]
    assert float(jnp.abs(values).min()) > 256.0
    rounded = values.astype(jnp.bfloat16).astype(jnp.float32)
    assert bool(jnp.any(values != rounded)), "no sum was rounded to bfloat16"


def test_logits_of_a_bfloat16_model_have_few_ties():
    """Of 512 tokens; logits rounded to bfloat16 tie at the top in a few rows of a hundred."""
    fields = {"dtype": "bfloat16", "vocab_size": 512, "context_length": 64, "num_steps": 1}
    for tied in (False, True):
        model, variables = drawn_model(name="GPT_Rec", tied_head=tied, **fields)
        tokens = jax.random.randint(jax.random.key(0), (16, 64), 0, 512)
        logits = jax.jit(model.apply)(variables, tokens)
        top = jnp.sort(logits, axis=-1)[..., -2:]
        share = float(jnp.mean(top[..., 0] == top[..., 1]))
        coarse = jnp.sort(logits.astype(jnp.bfloat16), axis=-1)[..., -2:]
        assert share < 0.2 * float(jnp.mean(coarse[..., 0] == coarse[..., 1]))


def test_by_autodiff_the_default_model_has_a_hessian(standard_promotion):
    """Forward over reverse (both modes), of the loss in the matrix of the attention energy."""
    del standard_promotion
    tokens = jnp.arange(6)[None] % 11
    model, params = small_model(implementation="autodiff", embed_dim=4), None
    params = drawn_model(**{**FIELDS, "embed_dim": 4})[1]["params"]

    def loss(matrix):
        attention = {**params["block"]["attention"], "J": matrix}
        block = {**params["block"], "attention": attention}
        return jnp.sum(model.apply({"params": {**params, "block": block}}, tokens) ** 2)

    matrix = params["block"]["attention"]["J"]
    hessian = jax.jit(jax.hessian(loss))(matrix).reshape(matrix.size, matrix.size)
    assert bool(jnp.all(jnp.isfinite(hessian)))
    scale = float(jnp.abs(hessian).max())
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-4 * scale)
    along = jax.random.normal(jax.random.key(1), matrix.shape)
    change = jax.jit(jax.grad(loss))
    found = (change(matrix + 1e-3 * along) - change(matrix - 1e-3 * along)) / 2e-3
    np.testing.assert_allclose(hessian @ along.ravel(), found.ravel(), atol=2e-2 * scale)


@pytest.mark.ci
def test_dropout_is_of_the_gradient_alone(standard_promotion):
    """Where the loss depends on values of energies, as in a mixture, these are not dropped."""
    del standard_promotion
    tokens = jnp.arange(12)[None] % 11
    fields = {**FIELDS, "dropout": 0.3, "combination": "mixture"}
    gradients = {}
    for implementation in ("fused", "autodiff"):
        model, params = drawn_model(**fields, implementation=implementation)
        rngs = {"dropout": jax.random.key(0)}
        loss = lambda p, m=model: jnp.sum(m.apply(p, tokens, train=True, rngs=rngs) ** 2)  # noqa: B023
        gradients[implementation] = jax.jit(jax.grad(loss))(params)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients["autodiff"]))
    chex.assert_trees_all_close(*gradients.values(), rtol=0, atol=1e-4 * scale)


def test_the_implementation_of_a_function_is_its_models_own(standard_promotion):
    """Traced anywhere, at any time: nothing around it is read."""
    del standard_promotion
    tokens = jnp.arange(20)[None] % 11
    programs: dict[str, set[bool]] = {}
    for implementation in ("fused", "autodiff", "fused"):
        model = small_model(implementation=implementation)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        states = lambda p, m=model: m.apply(p, tokens, method="forward")[0].x
        for around in ("fused", "autodiff"):
            with ops.implementation(around):
                program = str(jax.make_jaxpr(states)(params))
            programs.setdefault(implementation, set()).add("custom_vjp_call" in program)
    assert programs == {"fused": {True}, "autodiff": {False}}


FIELDS = {"name": "NRGPT_H_FF2W", "vocab_size": 11, "embed_dim": 16, "num_steps": 4}
FIELDS |= {"context_length": 20, "num_heads": 2}


def small_model(**fields):
    config = default_config().model
    config.update({**FIELDS, **fields})
    return create_model(config)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["NRGPT_H_FF2W", "GPT", "GPT_Rec", slow("NRGPT_H_FF1")])
def test_remat_changes_nothing_but_memory(name, standard_promotion):
    """Of 7 steps, which is no square of groups."""
    del standard_promotion
    tokens = jnp.arange(20)[None] % 11

    def of_loss(remat):
        model = small_model(name=name, num_steps=7, remat=remat)
        return jax.value_and_grad(lambda p: jnp.sum(model.apply(p, tokens) ** 2))

    by_every_choice = jax.jit(lambda p: [of_loss(r)(p) for r in ("none", "step", "full")])
    kept, *again = by_every_choice(drawn_model(**{**FIELDS, "name": name, "num_steps": 7})[1])
    for found in again:
        chex.assert_trees_all_close(found, kept, rtol=1e-4, atol=1e-4)


def temporary_bytes(model, batch, length):
    tokens = jax.ShapeDtypeStruct((batch, length), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    loss = lambda params, tokens: jnp.sum(model.apply(params, tokens) ** 2)
    analysis = jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square_of_the_context():
    fields: dict[str, Any] = {"embed_dim": 128, "num_heads": 4, "num_steps": 6}
    grown = {}
    for choice in ("fused", "autodiff"):
        short, long = (
            temporary_bytes(
                small_model(implementation=choice, context_length=n, **fields), 2048 // n, n
            )
            for n in (256, 1024)
        )
        grown[choice] = long / short
    assert grown["fused"] < 1.3 < 1.7 < grown["autodiff"], grown


@pytest.mark.slow
def test_memory_is_nearly_flat_in_the_number_of_steps_with_remat():
    fields = {"embed_dim": 64, "context_length": 128}
    grown = {}
    for remat in ("none", "step", "full"):
        few, many = (
            temporary_bytes(small_model(remat=remat, num_steps=t, **fields), 4, 128)
            for t in (6, 24)
        )
        grown[remat] = many / few
    assert grown["full"] < grown["step"] < 1.5 < 2.5 < grown["none"], grown
