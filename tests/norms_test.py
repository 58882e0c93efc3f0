"""grad(lagrangian) is the norm, with a nonzero bias and a gain; large means lose no digits."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, parameters
from flax import linen as nn

from nrgpt_jax.core.norms import NORMS, bind_norm


def norm_of(name, implementation):
    """`(params, x (B,N,D)) -> g`"""
    return lambda params, x: bind_norm(name, params, implementation).function(x)


X = 2.0 * jax.random.normal(jax.random.key(1), (2, 5, SIZES.D)) + 1.0


@pytest.mark.parametrize("name", NORMS)
def test_gradient_of_the_lagrangian_is_the_norm(name):
    norm, x = NORMS[name], X[0, 0]
    params = dict(parameters(jax.random.key(0), norm.specs))
    gain = params.pop("gain", jnp.ones(SIZES.D))
    gradient = jax.grad(norm.lagrangian, argnums=1)(params, x)
    chex.assert_trees_all_close(norm.function(params, x), gradient, rtol=1e-5)
    # With a gain the normalized part is scaled, the bias is not.
    bias = params.get("bias", jnp.zeros(SIZES.D))
    scaled = gain * (gradient - bias) + bias
    with_gain = {**params, "gain": gain} if "gain" in norm.specs else params
    chex.assert_trees_all_close(norm.function(with_gain, x), scaled, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "module"),
    [("layer_norm", nn.LayerNorm(epsilon=1e-5)), ("rms_norm", nn.RMSNorm(epsilon=1e-5))],
)
def test_norms_are_flax_norms(name, module):
    params = parameters(jax.random.key(0), NORMS[name].specs)
    theirs = {"scale": params["gain"]} | {k: v for k, v in params.items() if k == "bias"}
    found = norm_of(name, "autodiff")(params, X)
    expected = module.apply({"params": theirs}, X)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bare_layer_norm", "layer_norm"])
def test_the_rule_is_that_of_autodiff(name):
    """In values, first and second derivatives, in float64."""
    with jax.enable_x64(True):
        params = parameters(jax.random.key(0), NORMS[name].specs, "float64")
        x = X.astype("float64")
        weights = jax.random.normal(jax.random.key(2), x.shape, "float64")

        @partial(jax.jit, static_argnums=0)
        def derivatives(how, params, x):
            norm = norm_of(name, how)
            pulled = lambda params, x: jax.vjp(lambda x: norm(params, x), x)[1](weights)[0]
            value = lambda params, x: jnp.sum(weights * norm(params, x))
            second = lambda params, x: jnp.sum(pulled(params, x) ** 2)
            gradients = (jax.grad(f, (0, 1))(params, x) for f in (value, second))
            return norm(params, x), *gradients

        fast, plain = (derivatives(how, params, x) for how in ("fused", "autodiff"))
        chex.assert_trees_all_close(fast, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NORMS)
def test_of_a_batch_a_norm_is_that_of_each_token(name):
    norm = NORMS[name]
    params = parameters(jax.random.key(0), norm.specs)
    every = lambda x: (norm.function(params, x), norm.lagrangian(params, x), norm.sigma(x))
    each = jax.jit(jax.vmap(jax.vmap(every)))(X)
    chex.assert_trees_all_close(jax.jit(every)(X), each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["fused", "autodiff"])
def test_a_large_mean_cancels_no_digits(implementation):
    """One-pass variance, E[x^2] - E[x]^2, is off by a quarter here."""
    noise = np.random.default_rng(0).standard_normal((1, 3, 64))
    large = (1000.0 + noise).astype(np.float32)
    centred = large.astype(np.float64) - large.astype(np.float64).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    found = norm_of("bare_layer_norm", implementation)({"bias": jnp.zeros(64)}, jnp.asarray(large))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["bare_layer_norm", "layer_norm", "rms_norm"])
def test_jacobian_is_gain_times_projection_over_sigma(name):
    """sigma diag(1/gamma) J is symmetric and, but for epsilon, a projection."""
    norm, x = NORMS[name], X[0, 0]
    params = parameters(jax.random.key(0), norm.specs)
    jacobian = jax.jacobian(lambda x: norm.function(params, x))(x)
    core = norm.sigma(x) * jacobian / params.get("gain", jnp.ones(SIZES.D))[:, None]
    np.testing.assert_allclose(core, core.T, atol=1e-5)
    np.testing.assert_allclose(core @ core, core, atol=1e-4)
