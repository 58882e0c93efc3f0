"""grad(lagrangian) is the norm: on several tokens, with a nonzero bias and a gain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, parameters
from flax import linen as nn

from nrgpt_jax.core.norms import NORMS

X = 2.0 * jax.random.normal(jax.random.key(1), (5, SIZES.D)) + 1.0


@pytest.mark.parametrize("name", NORMS)
def test_gradient_of_the_lagrangian_is_the_norm(name):
    norm = NORMS[name]
    params = dict(parameters(jax.random.key(0), norm.specs(SIZES)))
    gain = params.pop("gain", jnp.ones(SIZES.D))
    gradient = jax.grad(lambda x: jnp.sum(norm.lagrangian(params, x)))(X)
    chex.assert_trees_all_close(norm.function(params, X), gradient, rtol=1e-5)
    # With a gain the normalized part is scaled, the bias is not.
    bias = params.get("bias", jnp.zeros(SIZES.D))[None]
    scaled = gain[None] * (gradient - bias) + bias
    with_gain = {**params, "gain": gain} if "gain" in norm.specs(SIZES) else params
    chex.assert_trees_all_close(norm.function(with_gain, X), scaled, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "module"),
    [("layer_norm", nn.LayerNorm(epsilon=1e-5)), ("rms_norm", nn.RMSNorm(epsilon=1e-5))],
)
def test_norms_are_flax_norms(name, module):
    params = parameters(jax.random.key(0), NORMS[name].specs(SIZES))
    theirs = {"scale": params["gain"]} | {k: v for k, v in params.items() if k == "bias"}
    np.testing.assert_allclose(
        NORMS[name].function(params, X), module.apply({"params": theirs}, X), rtol=2e-5, atol=1e-5
    )


def test_bare_layer_norm_has_a_bias_and_no_gain():
    assert set(NORMS["bare_layer_norm"].specs(SIZES)) == {"bias"}


@pytest.mark.parametrize("name", ["bare_layer_norm", "layer_norm", "rms_norm"])
def test_jacobian_is_gain_times_projection(name):
    """diag(1/gamma) times the Jacobian is symmetric and positive semi-definite."""
    norm = NORMS[name]
    params = parameters(jax.random.key(0), norm.specs(SIZES))
    jacobian = jax.jacobian(lambda x: norm.function(params, x[None])[0])(X[0])
    core = jacobian / params.get("gain", jnp.ones(SIZES.D))[:, None]
    np.testing.assert_allclose(core, core.T, atol=1e-5)
    assert float(jnp.min(jnp.linalg.eigvalsh(core))) > -1e-5
