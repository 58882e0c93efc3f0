"""The fast derivative rules equal plain automatic differentiation of the plain definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from core_helpers import attention_parameters, parameters

from nrgpt_jax.configs import default_config
from nrgpt_jax.core import attention, kernels
from nrgpt_jax.core.dynamics import energy_gradient
from nrgpt_jax.core.energies import ATTENTION, FEEDFORWARD
from nrgpt_jax.core.gelu import gelu
from nrgpt_jax.core.parameters import Sizes
from nrgpt_jax.models import create_model

SIZES = Sizes(D=8, H=2, Y=4, M=12)
PRECISIONS = {"float32": (np.float32, 2e-4), "float64": (np.float64, 1e-11)}


@pytest.fixture(params=PRECISIONS, name="precision")
def _precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield PRECISIONS[request.param]


def energy_and_derivatives(energy, params, g, weights):
    """Values, gradients in everything, and the outer gradients of the gradient in the query."""

    def gradient(params, g):
        return energy_gradient(lambda q, c: energy(params, q, c), g)

    def outer(params, g):
        return jnp.sum(weights * gradient(params, g))

    total = lambda params, query, context: jnp.sum(weights[:, 0] * energy(params, query, context))
    first = jax.grad(total, (0, 1, 2))(params, g, g)
    return energy(params, g, g), first, gradient(params, g), jax.grad(outer, (0, 1))(params, g)


def assert_same(energy, params, g, tolerance):
    weights = jax.random.normal(jax.random.key(4), g.shape, g.dtype)
    found = {}
    for choice in ("fused", "plain"):
        with kernels.use(choice):
            found[choice] = jax.jit(energy_and_derivatives, static_argnums=0)(
                lambda *args: energy(*args), params, g, weights
            )
    scale = lambda tree: max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
    for fused, plain in zip(found["fused"], found["plain"], strict=True):
        chex.assert_trees_all_close(fused, plain, rtol=0, atol=tolerance * max(scale(plain), 1.0))


def random_states(count, width, dtype):
    return jax.random.normal(jax.random.key(3), (count, width), dtype)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("count", [1, 131])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(precision, name, count, strict):
    dtype, tolerance = precision
    specs = ATTENTION[name].specs(SIZES)
    params = {k: 5.0 * v for k, v in parameters(jax.random.key(0), specs).items()}
    params |= {"alpha": jnp.array([0.7, 1.3]), "beta": jnp.array(0.8)}
    params = jax.tree.map(lambda p: p.astype(dtype), params)

    def energy(params, query, context):
        return ATTENTION[name].energy(params, query, context, strict=strict)

    assert_same(energy, params, random_states(count, SIZES.D, dtype), tolerance)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_with_dropout(precision, name):
    dtype, tolerance = precision
    params = jax.tree.map(lambda p: p.astype(dtype), attention_parameters(jax.random.key(0), name))
    heads, count = len(params["alpha"]), 70
    width = next(v for k, v in params.items() if v.ndim == 3).shape[-1]
    keep = 2.0 * jax.random.bernoulli(jax.random.key(1), 0.5, (heads, count, count)).astype(dtype)

    def energy(params, query, context):
        return ATTENTION[name].energy(params, query, context, strict=False, keep=keep)

    assert_same(energy, params, random_states(count, width, dtype), tolerance)


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_feedforward(precision, name):
    dtype, tolerance = precision
    params = parameters(jax.random.key(0), FEEDFORWARD[name].specs(SIZES))
    params = {k: (20.0 * v).astype(dtype) for k, v in params.items()}

    def energy(params, query, context):
        del context
        return FEEDFORWARD[name].function(params, query)

    assert_same(energy, params, random_states(7, SIZES.D, dtype), tolerance)


@pytest.mark.parametrize("choice", kernels.KERNELS)
def test_queries_may_be_the_last_tokens_of_a_longer_context(choice):
    of_query, of_keys = jax.random.split(jax.random.key(0))
    query = jax.random.normal(of_query, (1, 200, 4))
    keys = jax.random.normal(of_keys, (1, 2, 200, 4))

    @jax.jit
    def slope(query):
        return jax.grad(lambda q: jnp.sum(attention.log_sum_exp(q, keys, strict=True)))(query)

    with kernels.use(choice):
        whole, part = (attention.log_sum_exp(q, keys, strict=True) for q in (query, query[:, 150:]))
        chex.assert_trees_all_close(part, whole[:, :, 150:], rtol=1e-6)
        chex.assert_trees_all_close(slope(query[:, 150:]), slope(query)[:, 150:], atol=1e-5)
        bend = jax.jit(jax.grad(lambda q: jnp.sum(slope(q) ** 2)))
        chex.assert_trees_all_close(bend(query[:, 150:]), bend(query)[:, 150:], atol=1e-4)


def test_weights_of_a_row_far_above_the_others_do_not_overflow():
    query, keys = 100.0 * jnp.ones((1, 3, 4)), jnp.ones((1, 1, 3, 4))
    value, slope = jax.value_and_grad(
        lambda q: jnp.sum(attention.log_sum_exp(q, keys, strict=False))
    )(query)
    np.testing.assert_allclose(value, 1200.0 + np.log(6.0), rtol=1e-6)
    np.testing.assert_allclose(slope, jnp.ones_like(query), rtol=1e-5)


def test_plain_kernels_allow_forward_mode():
    """jax.hessian is forward over reverse, which the fast rules do not have."""
    second = jax.vmap(jax.grad(jax.grad(gelu)))
    z = jnp.linspace(-3.0, 3.0, 7)
    with kernels.use("plain"):
        plain = jnp.diagonal(jax.hessian(lambda z: jnp.sum(gelu(z)))(z))
    chex.assert_trees_all_close(second(z), plain, atol=1e-6)
    with pytest.raises(ValueError, match="unknown kernels 'fast'"), kernels.use("fast"):
        pass


def test_plain_stands_for_models_inside(standard_promotion):
    del standard_promotion
    model, tokens = small_model(), jnp.arange(20)[None] % 11
    params = model.init(jax.random.key(0), tokens)
    tangents = jax.tree.map(jnp.ones_like, params)
    forward = lambda: jax.jvp(lambda p: model.apply(p, tokens), (params,), (tangents,))
    with pytest.raises(TypeError, match="forward-mode"):
        forward()
    with kernels.use("plain"):
        assert bool(jnp.all(jnp.isfinite(forward()[1])))


def test_bfloat16():
    query = jax.random.normal(jax.random.key(0), (1, 100, 8), jnp.bfloat16)
    keys = jax.random.normal(jax.random.key(1), (1, 2, 100, 8), jnp.bfloat16)

    def slope(query, keys):
        value = lambda q: jnp.sum(attention.log_sum_exp(q, keys, strict=False))
        return jax.grad(value)(query)

    outer = jax.grad(lambda q, k: jnp.sum(slope(q, k).astype(jnp.float32) ** 2), (0, 1))
    for function in (lambda q, k: (slope(q, k),), outer):
        rough = function(query, keys)
        exact = function(query.astype(jnp.float32), keys.astype(jnp.float32))
        for a, b in zip(rough, exact, strict=True):
            assert a.dtype == jnp.bfloat16
            error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
            assert float(error) < 0.02


def small_model(**fields):
    config = default_config().model
    config.update({"name": "NRGPT_H_FF2W", "vocab_size": 11, "embed_dim": 16, "num_steps": 4})
    config.update({"context_length": 20, "num_heads": 2, **fields})
    return create_model(config)


def train(model, steps, batch):
    """The losses of a few steps of Adam on random tokens."""
    tokens = jax.random.randint(jax.random.key(5), (steps, batch, 21), 0, 11)
    params = model.init(jax.random.key(0), tokens[0, :, :-1])
    optimizer = optax.adam(3e-3)

    def loss_fn(params, tokens):
        logits = model.apply(params, tokens[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def step(carry, tokens):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), tokens)[1])(params)


def test_learning_curves_agree(standard_promotion):
    del standard_promotion
    fused, plain = (train(small_model(kernels=k), 200, 4) for k in ("fused", "plain"))
    assert float(plain[0] - plain[-1]) > 0.0
    np.testing.assert_allclose(fused, plain, atol=1e-4)


@pytest.mark.parametrize("name", ["NRGPT_H_FF1", "NRGPT_H_FF2W", "GPT", "GPT_Rec"])
@pytest.mark.parametrize("remat", ["step", "full"])
def test_remat_changes_nothing_but_memory(name, remat, standard_promotion):
    del standard_promotion
    if remat == "full" and not name.startswith("NRGPT"):
        pytest.skip("the transformer baselines have no remat=full")
    fields = {"name": name, "num_steps": 7}  # a prime
    kept, again = (train(small_model(remat=r, **fields), 3, 2) for r in ("none", remat))
    np.testing.assert_allclose(again, kept, rtol=1e-6)


def temporary_bytes(model, batch, length):
    tokens = jax.ShapeDtypeStruct((batch, length), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    loss = lambda params, tokens: jnp.sum(model.apply(params, tokens) ** 2)
    analysis = jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_does_not_grow_with_the_square_of_the_context():
    fields = {"embed_dim": 128, "num_heads": 4, "num_steps": 6}
    grown = {}
    for choice in ("fused", "plain"):
        short, long = (
            temporary_bytes(small_model(kernels=choice, context_length=n, **fields), 2048 // n, n)
            for n in (256, 1024)
        )
        grown[choice] = long / short
    assert grown["fused"] < 1.3 < 1.7 < grown["plain"], grown


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
