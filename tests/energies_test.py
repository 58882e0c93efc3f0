"""Every energy is one token's scalar, as its formula says, and any faster form of it agrees."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, context_of, energy_parameters, of_token
from marks import slow
from pages_helpers import registered_here

from nrgpt_jax import ops
from nrgpt_jax.core import energies
from nrgpt_jax.core.block import COMBINATIONS, bind
from nrgpt_jax.core.context import Context, over_contexts, over_tokens
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.models.names import energies_labelled

KEY = jax.random.key(0)
G = jax.random.normal(jax.random.key(1), (5, SIZES.D))
GELU = lambda z: jax.nn.gelu(z, approximate=False)
ATTENTION = energies_labelled("attention")
SLOWER = ("FF2", "low_rank_rope", "FFG")


def own_context(name, params, token, strict=False, g=G):
    """What token A of the sequence g looks at."""
    return of_token(context_of(name, params, g[None], strict), 0, token)


def energy_and_grad(name, params, g, strict, implementation="fused", dropout=None):
    """Energies (B,N) of tokens g (B,N,D) and their gradients, in the context of one another."""
    term = bind(ENERGIES[name], params, str(g.dtype))
    context = context_of(name, params, g, strict)._replace(dropout=dropout)

    def total(g):
        values = term.energy.function(term.params, g, context)
        return jnp.sum(values), values

    with ops.implementation(implementation):
        gradients, values = jax.grad(total, has_aux=True)(g)
    return values, gradients


def derivatives_in(jaxpr) -> set[str]:
    """The names of all primitives of a program that stand for custom derivatives."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {equation.primitive.name} & {"custom_jvp_call", "custom_vjp_call"}
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= derivatives_in(inner)
    return found


@pytest.mark.parametrize("name", ENERGIES)
def test_of_a_batch_an_energy_is_that_of_each_token(name):
    """Written over the last axis: the same lines for one token, in float64."""
    with jax.enable_x64(True):
        g = jax.random.normal(jax.random.key(1), (2, 5, SIZES.D), "float64")
        params = energy_parameters(KEY, name, "float64")
        energy, pairs = ENERGIES[name].function, [*np.ndindex(2, 5)]

        @partial(jax.jit, static_argnums=0)
        def both(strict):
            context = context_of(name, params, g, strict)
            each = [energy(params, g[pair], of_token(context, *pair)) for pair in pairs]
            return energy(params, g, context), each

        for strict in (False, True):
            batched, each = both(strict)
            chex.assert_shape([batched, *each], [(2, 5)] + [()] * 10)
            np.testing.assert_allclose(each, batched.ravel(), rtol=1e-12)


@pytest.mark.parametrize("name", ENERGIES)
def test_by_autodiff_there_are_no_rules(name):
    params = energy_parameters(KEY, name)
    of = lambda implementation: jax.make_jaxpr(
        lambda g: energy_and_grad(name, params, g, False, implementation)
    )(G[None])
    assert not derivatives_in(of("autodiff").jaxpr)
    assert bool(derivatives_in(of("fused").jaxpr)) == (name != "leak")


def test_what_is_written_for_one_token_is_taken_over_all_of_them():
    """With any tree for keys; its gradient of weights is not kept for every token."""
    one = lambda params, g, context: (
        jnp.vdot(g, params["W"] @ jnp.where(context.mask[:, None], context.keys["g"], 0.0).sum(0))
        + jnp.sum(jnp.where(context.mask, context.keys["norm"][0], 0.0))
    )
    key = lambda params, g, position: {"g": params["W"].T @ g, "norm": (jnp.vdot(g, g),)}
    params = {"W": jax.random.normal(KEY, (SIZES.D, SIZES.D))}
    keys = over_tokens(key)(params, G[None], jnp.arange(5)[None])
    chex.assert_shape([keys["g"], keys["norm"][0]], [(1, 5, SIZES.D), (1, 5)])
    context = context_of("leak", params, G[None], strict=True)._replace(keys=keys)
    found = over_contexts(one)(params, G[None], context)
    for token in range(5):
        expected = one(params, G[token], of_token(context, 0, token))
        np.testing.assert_allclose(found[0, token], expected, rtol=1e-4, atol=1e-5)
    program = jax.make_jaxpr(lambda params: over_contexts(one)(params, G[None], context))(params)
    assert not derivatives_in(program.jaxpr)


def test_a_mask_is_of_keys():
    context = context_of("leak", {"size": jnp.ones(())}, G[None], strict=True)
    with pytest.raises(ValueError, match=r"context\.mask"):
        _ = context.mask


def test_what_is_written_for_one_token_is_computed_in_float32():
    """In a model of bfloat16 too, attention energies among them; its keys are narrow."""
    with registered_here():
        energies.attention("ONE", {"J": energies.matrix("H D D")})(
            lambda params, g, position: params["J"] @ g
        )
        params = energy_parameters(KEY, "ONE")
        rough, exact = (bind(ENERGIES["ONE"], params, kind) for kind in ("bfloat16", "float32"))
        context = context_of("ONE", params, G[None], strict=True)
    narrow = context._replace(keys=context.keys.astype("bfloat16").astype("float32"))
    found = rough.energy.function(rough.params, G[None].astype(rough.dtype), narrow)
    expected = exact.energy.function(exact.params, G[None], narrow)
    assert rough.key_dtype == "bfloat16"
    np.testing.assert_array_equal(found, expected)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "strict"),
    [(name, False) for name in ENERGIES if name not in SLOWER]
    + [slow(name, False) for name in SLOWER]
    + [slow(name, True) for name in ATTENTION],
)
def test_the_rules_are_those_of_autodiff(name, strict):
    """In values, first and second derivatives, in float64."""
    count = 70 if name in ATTENTION else 7  # more than one block of rows
    with jax.enable_x64(True):
        params = energy_parameters(KEY, name, "float64")
        g = jax.random.normal(jax.random.key(3), (2, count, SIZES.D), "float64")
        weights = jax.random.normal(jax.random.key(4), g.shape, g.dtype)

        @partial(jax.jit, static_argnums=0)
        def derivatives(implementation, params, g):
            found = lambda p, g: energy_and_grad(name, p, g, strict, implementation)
            value = lambda p, g: jnp.sum(weights[..., 0] * found(p, g)[0])
            outer = lambda p, g: jnp.sum(weights * found(p, g)[1])
            return found(params, g), *(jax.grad(f, (0, 1))(params, g) for f in (value, outer))

        fast, plain = (derivatives(how, params, g) for how in ("fused", "autodiff"))
        scale = lambda tree: max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
        for one, other in zip(fast, plain, strict=True):
            limit = 1e-10 * max(scale(other), 1.0)
            chex.assert_trees_all_close(one, other, rtol=0, atol=limit)


@pytest.mark.parametrize("name", ATTENTION)
def test_dropout_drops_terms_of_the_gradient_only(name):
    params = energy_parameters(KEY, name)
    keep = 2.0 * jax.random.bernoulli(KEY, 0.5, (1, SIZES.H, 5, 5)).astype(jnp.float32)
    by_rules, by_autodiff = (
        jax.jit(lambda keep, how=how: energy_and_grad(name, params, G[None], False, how, keep))
        for how in ("fused", "autodiff")
    )
    values, dropped = by_autodiff(keep)
    chex.assert_trees_all_close(by_rules(keep), (values, dropped), atol=1e-5)
    without, whole = jax.jit(lambda g: energy_and_grad(name, params, g, False))(G[None])
    chex.assert_trees_all_close(values, without, rtol=1e-5)
    ones = by_autodiff(jnp.ones_like(keep))[1]
    chex.assert_trees_all_close(ones, whole, rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(dropped - whole))) > 1e-3
    complement = by_autodiff(2.0 - keep)[1]
    chex.assert_trees_all_close(dropped + complement, 2.0 * whole, rtol=1e-4, atol=1e-5)


# Formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "strict"), [("full_rank", True), ("low_rank", False)])
def test_attention_energies_are_those_of_the_paper(name, strict):
    """E_A = -sum_h alpha_h / beta log sum_B exp(beta g_B . J_h g_A), J of low rank a product."""
    params = energy_parameters(KEY, name)
    values, _ = jax.jit(lambda g: energy_and_grad(name, params, g, strict))(G[None])
    p, g = {name: np.asarray(value) for name, value in params.items()}, np.asarray(G)
    J = p["J"] if name == "full_rank" else np.einsum("hyd,hye->hde", p["W_K"], p["W_Q"])
    terms = np.exp(p["beta"] * np.einsum("bd,hde,ae->hab", g, J, g))
    sums = np.sum(terms * np.tril(np.ones((5, 5)), -1 if strict else 0), axis=-1)[:, strict:]
    expected = -p["alpha"] @ np.log(sums) / p["beta"]
    np.testing.assert_allclose(values[0, strict:], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ATTENTION)
def test_an_empty_context_has_no_energy_and_no_gradient(name):
    params = energy_parameters(KEY, name)
    for implementation in ("fused", "autodiff"):

        @jax.jit
        def with_outer(g, how=implementation):
            found = lambda g: energy_and_grad(name, params, g, True, how)
            return found(g), jax.grad(lambda g: jnp.sum(found(g)[1] ** 2))(g)

        (values, gradients), outer = with_outer(G[None])
        assert values[0, 0] == 0.0
        assert not jnp.any(gradients[0, 0])
        assert bool(jnp.all(jnp.isfinite(outer)))


@pytest.mark.parametrize("name", ["full_rank_rope", "low_rank_rope"])
def test_rotated_scores_depend_on_distances_only(name):
    """Of states that are all the same, and not on the place of both."""
    entry: Any = ENERGIES[name]
    params = energy_parameters(KEY, name)

    def scores(token, shift):
        positions = jnp.arange(5) + shift
        keys = entry.key(params, jnp.broadcast_to(G[1], (5, SIZES.D)), positions)
        query = entry.query(params, G[2], jnp.asarray(token + shift))
        return jnp.einsum("he,khe->hk" if keys.ndim == 3 else "he,ke->hk", query, keys)

    chex.assert_trees_all_close(scores(3, 0), scores(3, 40), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(scores(3, 0) - scores(2, 0)).max()) > 1e-3
    chex.assert_trees_all_close(ops.rotate(G[0], jnp.asarray(0)), G[0])


def test_feedforward_energies_are_their_formulas():
    scale = lambda p: p["scale"]
    first = own_context("FF1", None, 2).first
    n0 = (first - jnp.mean(first)) / jnp.std(first)
    for name, formula in {
        "FF1": lambda p, g: -np.sum(GELU(g @ p["W1"] + p["b1"]) ** 2),
        "FF2": lambda p, g: -np.sum(GELU(GELU(g @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]) ** 2),
        "FF2W": lambda p, g: -g @ (p["W2"] @ GELU(g @ p["W1"] + p["b1"]) + p["b2"]),
        "FF3": lambda p, g: -np.sum(np.maximum(g @ p["W1"] + p["b1"], 0) ** 3) / 3,
        "FFG_exact": lambda p, g: -0.5 * GELU(g @ p["W1"] + p["b1"]) @ (g @ p["W2"]) ** 2,
        "FFG_first": lambda p, g: -0.5 * GELU(n0 @ p["W1"] + p["b1"]) @ (g @ p["W2"]) ** 2,
    }.items():
        params = energy_parameters(KEY, name)
        found = ENERGIES[name].function(params, G[2], own_context(name, params, 2))
        np.testing.assert_allclose(found, scale(params) * formula(params, G[2]), rtol=1e-5)


def test_a_gate_is_the_tokens_own_and_is_not_differentiated():
    p = energy_parameters(KEY, "FFG")
    context = own_context("FFG", p, 2)
    function = ENERGIES["FFG"].function
    energy = lambda params, g, own: function(params, g, context._replace(g=own))
    gate, up = GELU(G[3] @ p["W1"] + p["b1"]), G[2] @ p["W2"]
    scale = p["scale"]
    np.testing.assert_allclose(energy(p, G[2], G[3]), -0.5 * scale * gate @ up**2, rtol=1e-5)
    move = -jax.grad(energy, argnums=1)(p, G[2], G[3])
    np.testing.assert_allclose(move, scale * p["W2"] @ (gate * up), rtol=1e-5)
    gate, up = GELU(G @ p["W1"] + p["b1"][None]), G @ p["W2"]
    found = energy_and_grad("FFG", p, G[None], strict=False)[1][0]
    np.testing.assert_allclose(found, -scale * (gate * up) @ p["W2"].T, rtol=1e-4, atol=1e-6)


def test_the_other_energies_are_their_formulas():
    params = energy_parameters(KEY, "injection")
    context = own_context("injection", params, 3)
    found = ENERGIES["injection"].function(params, G[3], context)
    np.testing.assert_allclose(found, -G[3] @ (params["W"] @ G[1]), rtol=1e-5)
    params = {"size": jnp.asarray(0.3)}
    context = own_context("leak", params, 3)
    gradient = jax.grad(ENERGIES["leak"].function, argnums=1)(params, G[3], context)
    np.testing.assert_allclose(gradient, 0.3 * context.x, rtol=1e-6)


def test_combinations_are_their_formulas():
    values = jnp.array([1.0, -2.0, 0.5])
    assert float(COMBINATIONS["sum"].function({}, values)) == -0.5
    found = COMBINATIONS["mixture"].function({"tau": jnp.asarray(0.7)}, values)
    np.testing.assert_allclose(found, -0.7 * np.log(np.sum(np.exp(-values / 0.7))), rtol=1e-6)
    coldest = COMBINATIONS["mixture"].function({"tau": jnp.asarray(1e-3)}, values)
    np.testing.assert_allclose(coldest, -2.0, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_gelu_and_its_derivatives(order):
    def by_autodiff(z):
        with ops.implementation("autodiff"):
            return ops.gelu(z)

    functions: list[Any] = [by_autodiff, ops.gelu, GELU]
    for _ in range(order):
        functions = [jax.grad(function) for function in functions]
    points = jnp.linspace(-6.0, 6.0, 101)
    plain, fast, reference = (jax.vmap(function)(points) for function in functions)
    np.testing.assert_allclose(plain, reference, atol=2e-6)
    np.testing.assert_allclose(fast, reference, atol=2e-6)


def test_a_causal_mask():
    mask = ops.causal_mask(jnp.arange(3), 3, strict=True)
    assert mask.tolist() == np.tril(np.ones((3, 3)), -1).tolist()
    one = ops.causal_mask(jnp.array([[0], [2]]), 4, strict=False)
    assert one[:, 0].tolist() == [[True, False, False, False], [True] * 3 + [False]]
    zero = jnp.zeros(())
    context = Context(jnp.zeros((4, 2)), True, jnp.asarray(1), zero, zero, zero, zero)
    assert context.mask.tolist() == [True, False, False, False]


def test_registering():
    with pytest.raises(ValueError, match="registered already"):
        energies.feedforward("FF1", {})(lambda params, g: None)
    with pytest.raises(KeyError, match=r"unknown energy 'FF9'; known: FF1, FF2, FF2W, FF3"):
        _ = ENERGIES["FF9"]
    with pytest.raises(ValueError, match="energy 'norm': the name is taken"):
        energies.energy("norm", {})
    with pytest.raises(ValueError, match="energy 'eta': the name is taken"):
        energies.feedforward("eta", {})(lambda params, g: g[0])
    with pytest.raises(ValueError, match="L is the axis of distinct blocks"):
        energies.matrix("L D")
