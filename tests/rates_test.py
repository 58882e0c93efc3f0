"""Inference rates: their shapes, and the inequality that each guarantee rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, random_like
from hypothesis import given, settings
from hypothesis import strategies as st

from nrgpt_jax.core.parameters import Sizes, init_parameters
from nrgpt_jax.core.rates import RATES, apply_rate

GAIN = jnp.linspace(0.5, 2.0, SIZES.D)


def eta(name, key, size=1.0, sizes=SIZES, noise=1.0):
    params = init_parameters(key, RATES[name].specs(sizes, size))
    gain = jnp.linspace(0.5, 2.0, sizes.D)
    return RATES[name].eta(random_like(key, params, noise), gain)


@given(width=st.sampled_from([1, 2, 7, 12]), seed=st.integers(0, 2**30))
@settings(max_examples=25, deadline=None)
def test_psd_has_a_positive_semi_definite_symmetric_part(width, seed):
    matrix = eta("psd", jax.random.key(seed), sizes=Sizes(D=width))
    spectrum = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert float(spectrum[0]) > -1e-4 * float(jnp.abs(spectrum).max() + 1)


def test_psd_is_not_just_symmetric_and_full_is_unconstrained():
    matrix = eta("psd", jax.random.key(0))
    assert float(jnp.abs(matrix - matrix.T).max()) > 0.1
    matrix = eta("full", jax.random.key(0))
    assert float(jnp.linalg.eigvalsh(matrix + matrix.T)[0]) < 0.0


@pytest.mark.parametrize("name", ["diagonal", "scalar", "gamma", "identity"])
def test_simple_rates_are_positive(name):
    for seed in range(5):
        assert float(jnp.min(eta(name, jax.random.key(seed), noise=5.0))) > 0.0


def test_gamma_is_proportional_to_the_gain():
    ratio = eta("gamma", jax.random.key(0)) / GAIN
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["gamma", "psd", "diagonal", "scalar"])
def test_initial_value(name):
    matrix = eta(name, jax.random.key(0), size=0.25, noise=0.0)
    unit = GAIN if name == "gamma" else jnp.ones(SIZES.D)
    diagonal = jnp.diag(matrix) if matrix.ndim == 2 else matrix * jnp.ones(SIZES.D)
    np.testing.assert_allclose(diagonal, 0.25 * unit, rtol=0.25)


@pytest.mark.parametrize("name", RATES)
def test_apply_rate_multiplies_every_token(name):
    gradient = jax.random.normal(jax.random.key(2), (5, SIZES.D))
    rate = eta(name, jax.random.key(0))
    matrix = rate if rate.ndim == 2 else jnp.diag(rate * jnp.ones(SIZES.D))
    expected = np.stack([np.asarray(matrix) @ row for row in np.asarray(gradient)])
    np.testing.assert_allclose(apply_rate(rate, gradient), expected, rtol=1e-4, atol=1e-5)
