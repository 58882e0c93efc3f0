"""The energies equal their formulas, and their gradients the closed forms of the paper."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, attention_parameters, parameters

from nrgpt_jax.core import energies
from nrgpt_jax.core.dynamics import energy_gradient
from nrgpt_jax.core.energies import ATTENTION, FEEDFORWARD

KEY = jax.random.key(0)
G = jax.random.normal(jax.random.key(1), (5, SIZES.D))
GELU = lambda z: jax.nn.gelu(z, approximate=False)


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
def test_attention_energy_is_the_sum_of_the_paper(strict):
    params = attention_parameters(KEY, "full_rank")
    energy = energies.full_rank(params, G, G, strict=strict)
    np.testing.assert_allclose(energy, naive_attention(params, G, strict), rtol=2e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_attention_gradient_is_the_closed_form(strict):
    params = attention_parameters(KEY, "full_rank")
    found = energy_gradient(lambda q, c: energies.full_rank(params, q, c, strict=strict), G)
    mask = np.tril(np.ones((5, 5)), -1 if strict else 0)
    expected = np.zeros_like(G)
    for h in range(SIZES.H):
        scores = params["beta"] * np.einsum(
            "ad,bd->ab", np.einsum("de,ae->ad", params["J"][h], G), G
        )
        weights = mask * np.exp(scores)
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-30)
        expected -= params["alpha"][h] * weights @ np.asarray(G) @ np.asarray(params["J"][h])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_strict_first_token_has_no_energy_and_no_gradient():
    for name in ATTENTION:
        params = attention_parameters(KEY, name)
        energy = lambda q, c, f=ATTENTION[name].energy, p=params: f(p, q, c, strict=True)
        assert energy(G, G)[0] == 0.0
        assert not jnp.any(energy_gradient(energy, G)[0])
        assert jnp.all(jnp.isfinite(jax.jacobian(lambda g, e=energy: energy_gradient(e, g))(G)))


def test_low_rank_is_full_rank_with_a_product():
    params = attention_parameters(KEY, "low_rank")
    product = jnp.einsum("hyd,hye->hde", params["W_K"], params["W_Q"])
    full = {"J": product, "alpha": params["alpha"], "beta": params["beta"]}
    chex.assert_trees_all_close(
        ATTENTION["low_rank"].energy(params, G, G, strict=False),
        energies.full_rank(full, G, G, strict=False),
        rtol=1e-5,
    )


def test_queries_are_the_last_tokens_of_the_context():
    params = attention_parameters(KEY, "full_rank")
    whole = energies.full_rank(params, G, G, strict=True)
    part = energies.full_rank(params, G[-2:], G, strict=True)
    chex.assert_trees_all_close(part, whole[-2:], rtol=1e-6)


def test_feedforward_energies_are_their_formulas():
    for name, formula in {
        "FF1": lambda p, g: -np.sum(GELU(g @ p["W1"] + p["b1"]) ** 2),
        "FF2": lambda p, g: -np.sum(GELU(GELU(g @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]) ** 2),
        "FF2W": lambda p, g: -g @ (p["W2"] @ GELU(g @ p["W1"] + p["b1"]) + p["b2"]),
    }.items():
        params = parameters(KEY, FEEDFORWARD[name].specs(SIZES))
        found = FEEDFORWARD[name].function(params, G)
        np.testing.assert_allclose(found, [formula(params, g) for g in G], rtol=1e-5, err_msg=name)


def test_hidden_widths():
    shapes = {n: {k: s.shape for k, s in FEEDFORWARD[n].specs(SIZES).items()} for n in FEEDFORWARD}
    assert shapes["FF1"]["W1"] == (8, 12)
    assert (shapes["FF2"]["W1"], shapes["FF2"]["W2"]) == ((8, 8), (8, 12))
    assert (shapes["FF2W"]["W1"], shapes["FF2W"]["W2"]) == ((8, 12), (8, 12))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_gelu_and_its_derivatives(order):
    functions: list[Any] = [energies.gelu, GELU]
    for _ in range(order):
        functions = [jax.grad(function) for function in functions]
    ours, reference = (jax.vmap(function)(jnp.linspace(-6.0, 6.0, 101)) for function in functions)
    np.testing.assert_allclose(ours, reference, atol=2e-6)


def test_attention_dropout_drops_terms_of_the_gradient_only():
    params = attention_parameters(KEY, "full_rank")
    keep = 2.0 * jax.random.bernoulli(KEY, 0.5, (SIZES.H, 5, 5)).astype(jnp.float32)
    energy = lambda keep: lambda q, c: energies.full_rank(params, q, c, strict=False, keep=keep)
    chex.assert_trees_all_close(energy(keep)(G, G), energy(None)(G, G))
    ones = energy_gradient(energy(jnp.ones_like(keep)), G)
    chex.assert_trees_all_close(ones, energy_gradient(energy(None), G), rtol=1e-5)
    dropped = energy_gradient(energy(keep), G)
    complement = energy_gradient(energy(2.0 - keep), G)
    assert float(jnp.max(jnp.abs(dropped - ones))) > 1e-3
    chex.assert_trees_all_close(dropped + complement, 2.0 * ones, rtol=1e-4, atol=1e-5)


def test_registering():
    with pytest.raises(ValueError, match="registered already"):
        energies.feedforward("FF1", lambda s: {})(lambda params, g: None)
    with pytest.raises(KeyError, match="known: FF1, FF2, FF2W"):
        _ = FEEDFORWARD["FF3"]
