"""Every energy is one token's scalar, as its formula says, and any faster form of it agrees."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, energy_parameters, surroundings
from marks import slow

from nrgpt_jax.core import energies
from nrgpt_jax.core.combinations import COMBINATIONS
from nrgpt_jax.core.contexts import CausalMask, Context
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.terms import bind
from nrgpt_jax.kernels import KERNELS, kernel_of
from nrgpt_jax.models.names import energies_labelled

KEY = jax.random.key(0)
G = jax.random.normal(jax.random.key(1), (5, SIZES.D))
GELU = lambda z: jax.nn.gelu(z, approximate=False)
ATTENTION = energies_labelled("attention")


def context_of(name, params, token, strict, g=G):
    """What token A of the sequence g looks at."""
    memory, count = ENERGIES[name].memory, jnp.arange(len(g))
    seen = None if memory is None else jax.vmap(lambda g, at: memory(params, g, at))(g, count)
    mask = count < token if strict else count <= token
    at, own = jnp.asarray(token), g[token]
    return Context(seen, mask, at, 2.0 * own, g[0], jnp.sum(own**2), own)


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
def test_an_energy_is_a_scalar_differentiated_by_jax_alone(name):
    entry, params = ENERGIES[name], energy_parameters(KEY, name)
    context = context_of(name, params, 3, strict=False)
    chex.assert_shape(entry.function(params, G[3], context), ())
    term = bind(entry, params)
    around = surroundings(name, params, G[None], strict=False)
    program = jax.make_jaxpr(lambda g: term.slope(g, around))(G[None])
    assert not derivatives_in(program.jaxpr)
    values, gradients = jax.eval_shape(lambda g: term.slope(g, around), G[None])
    chex.assert_shape((values, gradients), ((1, 5), (1, 5, SIZES.D)))


def test_what_would_be_a_custom_derivative_is_seen():
    program = jax.make_jaxpr(jax.vmap(jax.grad(lambda z: jax.nn.relu(z))))(G[0])
    assert derivatives_in(program.jaxpr)


def slopes_and_derivatives(term_of, params, g, strict, name):
    """Values and gradients, their outer gradients in parameters, states and the context."""
    weights = jax.random.normal(jax.random.key(4), g.shape, g.dtype)
    kind = str(g.dtype)

    def slope(params, g):
        return term_of(params).slope(g, surroundings(name, params, g, strict, kind))

    def outer(params, g):
        return jnp.sum(weights * slope(params, g)[1])

    def value(params, g):
        return jnp.sum(weights[..., 0] * slope(params, g)[0])

    return slope(params, g), jax.grad(value, (0, 1))(params, g), jax.grad(outer, (0, 1))(params, g)


@pytest.mark.parametrize(
    ("name", "strict"),
    [(name, False) for name in KERNELS] + [slow(name, True) for name in ATTENTION],
)
def test_a_kernel_equals_the_definition(name, strict):
    """In values, first and second derivatives, in float64."""
    count = 70 if name in ATTENTION else 7  # more than one block of rows
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype("float64"), energy_parameters(KEY, name))
        g = jax.random.normal(jax.random.key(3), (2, count, SIZES.D), "float64")

        @partial(jax.jit, static_argnums=0)
        def derivatives(kernels, params, g):
            term = lambda params: bind(ENERGIES[name], params, kernel_of(name, kernels), "float64")
            return slopes_and_derivatives(term, params, g, strict, name)

        fast, plain = (derivatives(kernels, params, g) for kernels in ("fused", "plain"))
        scale = lambda tree: max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
        for one, other in zip(fast, plain, strict=True):
            limit = 1e-10 * max(scale(other), 1.0)
            chex.assert_trees_all_close(one, other, rtol=0, atol=limit)


@pytest.mark.parametrize("name", ATTENTION)
def test_dropout_drops_terms_of_the_gradient_only(name):
    params = energy_parameters(KEY, name)
    keep = 2.0 * jax.random.bernoulli(KEY, 0.5, (1, SIZES.H, 5, 5)).astype(jnp.float32)
    around = surroundings(name, params, G[None], strict=False)
    fast, plain = (bind(ENERGIES[name], params, kernel_of(name, k)) for k in ("fused", "plain"))
    fast_dropped, plain_dropped = fast.dropped, plain.dropped
    assert fast_dropped
    assert plain_dropped
    by_kernel, by_definition = (
        jax.jit(lambda keep, dropped=dropped: dropped(G[None], around, keep))
        for dropped in (fast_dropped, plain_dropped)
    )
    dropped = by_definition(keep)
    chex.assert_trees_all_close(by_kernel(keep), dropped, atol=1e-5)
    whole = jax.jit(lambda g: plain.slope(g, around)[1])(G[None])
    ones = by_definition(jnp.ones_like(keep))
    chex.assert_trees_all_close(ones, whole, rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(dropped - whole))) > 1e-3
    complement = by_definition(2.0 - keep)
    chex.assert_trees_all_close(dropped + complement, 2.0 * whole, rtol=1e-4, atol=1e-5)


# Formulas ---------------------------------------------------------------------------------------


def naive_attention(params, g, strict):
    """The sum of the paper, one token, one head, one key at a time."""
    out = []
    for a in range(len(g)):
        total = 0.0
        for h in range(SIZES.H):
            scores = [g[b] @ params["J"][h] @ g[a] for b in range(a if strict else a + 1)]
            if scores:
                lse = np.log(np.sum(np.exp(params["beta"] * np.array(scores))))
                total -= params["alpha"][h] / params["beta"] * lse
        out.append(total)
    return np.array(out, np.float32)


@pytest.mark.parametrize("strict", [True, False])
def test_attention_energy_and_gradient_are_those_of_the_paper(strict):
    params = energy_parameters(KEY, "full_rank")
    around = surroundings("full_rank", params, G[None], strict)
    slope = bind(ENERGIES["full_rank"], params).slope
    values, found = jax.jit(lambda g: slope(g, around))(G[None])
    params = {name: np.asarray(value) for name, value in params.items()}
    expected = naive_attention(params, np.asarray(G), strict)
    np.testing.assert_allclose(values[0], expected, rtol=2e-5, atol=1e-6)
    mask = np.tril(np.ones((5, 5)), -1 if strict else 0)
    expected = np.zeros_like(G)
    for h in range(SIZES.H):
        turned = np.einsum("de,ae->ad", params["J"][h], G)
        weights = mask * np.exp(params["beta"] * np.einsum("ad,bd->ab", turned, G))
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-30)
        expected -= params["alpha"][h] * weights @ np.asarray(G) @ params["J"][h]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTION)
def test_an_empty_context_has_no_energy_and_no_gradient(name):
    params = energy_parameters(KEY, name)
    for kernel in ("fused", "plain"):
        term = bind(ENERGIES[name], params, kernel_of(name, kernel))

        @jax.jit
        def slope_and_outer(g, term=term):
            slope = lambda g: term.slope(g, surroundings(name, params, g, strict=True))
            return slope(g), jax.grad(lambda g: jnp.sum(slope(g)[1] ** 2))(g)

        (values, gradients), outer = slope_and_outer(G[None])
        assert values[0, 0] == 0.0
        assert not jnp.any(gradients[0, 0])
        assert bool(jnp.all(jnp.isfinite(outer)))


def test_low_rank_is_full_rank_with_a_product():
    params = energy_parameters(KEY, "low_rank")
    product = jnp.einsum("hyd,hye->hde", params["W_K"], params["W_Q"])
    full = {"J": product, "alpha": params["alpha"], "beta": params["beta"]}
    low = ENERGIES["low_rank"].function(params, G[4], context_of("low_rank", params, 4, False))
    same = ENERGIES["full_rank"].function(full, G[4], context_of("full_rank", full, 4, False))
    np.testing.assert_allclose(low, same, rtol=1e-5)


@pytest.mark.parametrize("name", ["full_rank_rope", "low_rank_rope"])
def test_rotated_scores_depend_on_distances_only(name):
    """Of states that are all the same, and not on the place of both."""
    entry, params = ENERGIES[name], energy_parameters(KEY, name)

    def scores(token, shift):
        assert entry.memory
        assert entry.scores
        memory = jax.vmap(partial(entry.memory, params, G[1]))(jnp.arange(5) + shift)
        context = Context(memory, jnp.ones(5, bool), jnp.asarray(token + shift), *[G[0]] * 4)
        return entry.scores(params, G[2], context)

    chex.assert_trees_all_close(scores(3, 0), scores(3, 40), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(scores(3, 0) - scores(2, 0)).max()) > 1e-3
    chex.assert_trees_all_close(energies.rotate(G[0], jnp.asarray(0)), G[0])


def test_feedforward_energies_are_their_formulas():
    scale = lambda p: p["scale"]
    for name, formula in {
        "FF1": lambda p, g: -np.sum(GELU(g @ p["W1"] + p["b1"]) ** 2),
        "FF2": lambda p, g: -np.sum(GELU(GELU(g @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]) ** 2),
        "FF2W": lambda p, g: -g @ (p["W2"] @ GELU(g @ p["W1"] + p["b1"]) + p["b2"]),
    }.items():
        params = energy_parameters(KEY, name)
        found = ENERGIES[name].function(params, G[2], context_of(name, params, 2, False))
        np.testing.assert_allclose(found, scale(params) * formula(params, G[2]), rtol=1e-5)


def test_a_gate_is_the_tokens_own_and_is_not_differentiated():
    p = energy_parameters(KEY, "FFG")
    context = context_of("FFG", p, 2, False)
    function = ENERGIES["FFG"].function
    energy = lambda params, g, own: function(params, g, context._replace(g=own))
    gate, up = GELU(G[3] @ p["W1"] + p["b1"]), G[2] @ p["W2"]
    scale = p["scale"]
    np.testing.assert_allclose(energy(p, G[2], G[3]), -0.5 * scale * gate @ up**2, rtol=1e-5)
    move = -jax.grad(energy, argnums=1)(p, G[2], G[3])
    np.testing.assert_allclose(move, scale * p["W2"] @ (gate * up), rtol=1e-5)
    term, around = bind(ENERGIES["FFG"], p), surroundings("FFG", p, G[None], strict=False)
    gate, up = GELU(G @ p["W1"] + p["b1"][None]), G @ p["W2"]
    found = term.slope(G[None], around)[1][0]
    np.testing.assert_allclose(found, -scale * (gate * up) @ p["W2"].T, rtol=1e-4, atol=1e-6)


def test_the_other_energies_are_their_formulas():
    params = energy_parameters(KEY, "injection")
    context = context_of("injection", params, 3, False)
    found = ENERGIES["injection"].function(params, G[3], context)
    np.testing.assert_allclose(found, -G[3] @ (params["W"] @ G[0]), rtol=1e-5)
    params = {"size": jnp.asarray(0.3)}
    context = context_of("leak", params, 3, False)
    gradient = jax.grad(ENERGIES["leak"].function, argnums=1)(params, G[3], context)
    np.testing.assert_allclose(gradient, 0.3 * context.x, rtol=1e-6)


def test_combinations_are_their_formulas():
    values = jnp.array([1.0, -2.0, 0.5])
    assert float(COMBINATIONS["sum"].function({}, values)) == -0.5
    found = COMBINATIONS["mixture"].function({"tau": jnp.asarray(0.7)}, values)
    np.testing.assert_allclose(found, -0.7 * np.log(np.sum(np.exp(-values / 0.7))), rtol=1e-6)
    coldest = COMBINATIONS["mixture"].function({"tau": jnp.asarray(1e-3)}, values)
    np.testing.assert_allclose(coldest, -2.0, rtol=1e-5)


def test_hidden_widths():
    shape = lambda name, matrix: ENERGIES[name].specs[matrix].shape(SIZES)
    assert shape("FF1", "W1") == (8, 12)
    assert (shape("FF2", "W1"), shape("FF2", "W2")) == ((8, 8), (8, 12))
    assert (shape("FF2W", "W1"), shape("FF2W", "W2")) == ((8, 12), (8, 12))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_gelu_and_its_derivatives(order):
    from nrgpt_jax.kernels import gelu

    functions: list[Any] = [energies.gelu, gelu.gelu, GELU]
    for _ in range(order):
        functions = [jax.grad(function) for function in functions]
    points = jnp.linspace(-6.0, 6.0, 101)
    plain, fast, reference = (jax.vmap(function)(points) for function in functions)
    np.testing.assert_allclose(plain, reference, atol=2e-6)
    np.testing.assert_allclose(fast, reference, atol=2e-6)


def test_places():
    assert CausalMask(strict=True).mask(3, 3)[0].tolist() == np.tril(np.ones((3, 3)), -1).tolist()
    one = CausalMask(strict=False, at=jnp.array([0, 2]))
    assert one.positions(1).tolist() == [[0], [2]]
    assert one.mask(1, 4)[:, 0].tolist() == [[True, False, False, False], [True] * 3 + [False]]


def test_registering():
    with pytest.raises(ValueError, match="registered already"):
        energies.feedforward("FF1", {})(lambda params, g: None)
    with pytest.raises(KeyError, match=r"unknown energy 'FF3'; known: FF1, FF2, FF2W, FFG"):
        _ = ENERGIES["FF3"]
    with pytest.raises(ValueError, match="energy 'norm': the name is taken"):
        energies.energy("norm", {})
    with pytest.raises(ValueError, match="energy 'eta': the name is taken"):
        energies.feedforward("eta", {})(lambda params, g: g[0])
    with pytest.raises(ValueError, match="Q is no letter of Sizes"):
        energies.matrix("D Q")
    with pytest.raises(ValueError, match="L is no letter of Sizes"):
        energies.matrix("L D")  # of distinct blocks, which no energy knows of
    with pytest.raises(ValueError, match="unknown kernels 'fast'"):
        kernel_of("FF1", "fast")
