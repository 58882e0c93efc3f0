"""Inference rates: their shapes, and the inequality that each guarantee rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, random_like
from decoding_helpers import first_dynamics, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nrgpt_jax.core.parameters import Sizes, init_parameters
from nrgpt_jax.core.rules import RATES, apply_rate

GAIN = jnp.linspace(0.5, 2.0, SIZES.D)


def eta(name, key, size=1.0, sizes=SIZES, noise=1.0):
    params = init_parameters(key, RATES[name].specs(size), sizes)
    positive = {n: jnp.exp(noise * jax.random.normal(key, p.shape)) * p for n, p in params.items()}
    drawn = positive if "c" in params else random_like(key, params, noise)
    return RATES[name].eta(drawn, jnp.linspace(0.5, 2.0, sizes.D))


@given(width=st.sampled_from([1, 7]), seed=st.integers(0, 2**30))
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


@pytest.mark.parametrize("name", ["gamma", "psd", "diagonal", "scalar"])
def test_initial_value(name):
    matrix = eta(name, jax.random.key(0), size=0.25, noise=0.0)
    unit = GAIN if name == "gamma" else jnp.ones(SIZES.D)
    diagonal = jnp.diag(matrix) if matrix.ndim == 2 else matrix * jnp.ones(SIZES.D)
    np.testing.assert_allclose(diagonal, 0.25 * unit, rtol=0.25 if name == "psd" else 1e-5)


@pytest.mark.parametrize("name", RATES)
def test_apply_rate_multiplies_every_token(name):
    gradient = jax.random.normal(jax.random.key(2), (1, 5, SIZES.D))
    rate = eta(name, jax.random.key(0))
    matrix = rate if rate.ndim == 2 else jnp.diag(rate * jnp.ones(SIZES.D))
    expected = np.stack([np.asarray(matrix) @ row for row in np.asarray(gradient[0])])
    np.testing.assert_allclose(apply_rate(rate, gradient)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_certified_matrix_is_not_rounded_before_its_use():
    """In bfloat16 the least eigenvalue of this matrix would be negative."""
    key = jax.random.key(3)
    matrix = jax.random.normal(key, (32, 32))
    singular = matrix[:, :20] @ matrix[:, :20].T / 32  # twelve eigenvalues of zero
    rounded = singular.astype(jnp.bfloat16).astype(jnp.float32)
    assert float(jnp.linalg.eigvalsh(rounded)[0]) < -1e-4
    for name, entry in RATES.items():
        assert entry.constrained == (name != "full")
    model, variables = small_model(inference_rate="psd", norm="none", dtype="bfloat16")
    bound = model.bind(variables)
    rule = first_dynamics(bound, jnp.zeros((1, 1, 8))).rule
    applied = [rule.update(row[None, None], (), row[None, None])[0][0, 0] for row in jnp.eye(8)]
    np.testing.assert_allclose(-jnp.stack(applied, axis=1), bound.eta(), rtol=1e-6)
