"""The recurrent dynamics: scan equals loop, no future leaks, energy falls where promised."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, make_dynamics
from hypothesis import given, settings
from hypothesis import strategies as st

from nrgpt_jax.core import dynamics
from nrgpt_jax.core.parameters import Sizes

X = jax.random.normal(jax.random.key(1), (5, SIZES.D))
SCALES = jnp.array([0.3, 0.2, 0.1, 0.25])


@pytest.mark.parametrize("jit", [True, False])
def test_scan_equals_loop_in_values_and_gradients(jit):
    model = make_dynamics(jax.random.key(0), rate="full")

    def scanned(x, scales):
        return jnp.sum(dynamics.rollout(lambda _: model, x, scales) ** 2)

    def looped(x, scales):
        for scale in scales:
            x = dynamics.step(model, x, scale)
        return jnp.sum(x**2)

    value_and_grad = lambda f: jax.value_and_grad(f, argnums=(0, 1))
    wrap = jax.jit if jit else lambda f: f
    chex.assert_trees_all_close(
        wrap(value_and_grad(scanned))(X, SCALES),
        wrap(value_and_grad(looped))(X, SCALES),
        rtol=1e-4,
        atol=1e-5,
    )


def test_trajectory_is_the_rollout_with_its_energies():
    model = make_dynamics(jax.random.key(0))
    path = dynamics.trajectory(model, X, SCALES)
    chex.assert_shape(path.states, (5, 5, SIZES.D))
    chex.assert_trees_all_close(path.states[0], X)
    last = dynamics.rollout(lambda _: model, X, SCALES)
    chex.assert_trees_all_close(path.states[-1], last, rtol=1e-5)
    g = model.norm(path.states[2])
    for name, energy in model.energies.items():
        chex.assert_trees_all_close(path.energies[name][2], energy(g, g), rtol=1e-5)
    total = path.energies["attention"] + path.energies["feedforward"]
    chex.assert_trees_all_close(path.energies["total"], total, rtol=1e-6)


def influence(step):
    """(N,N): whether the new state of token A depends on the old state of token B."""
    jacobian = jax.jacobian(step)(X)
    return np.abs(np.asarray(jacobian)).max(axis=(1, 3)) > 0.0


@pytest.mark.parametrize("strict", [True, False])
def test_the_future_does_not_leak(strict):
    model = make_dynamics(jax.random.key(0), strict=strict)
    rolled = influence(lambda x: dynamics.rollout(lambda _: model, x, SCALES))
    assert not np.triu(rolled, 1).any()
    assert np.tril(rolled).sum() == 15  # and all of the past does


def test_differentiating_the_summed_energy_as_a_whole_would_leak():
    model = make_dynamics(jax.random.key(0))

    def leaky(x):
        total = lambda g: sum(jnp.sum(e(g, g)) for e in model.energies.values())
        return x - jax.grad(total)(x)

    assert np.triu(influence(leaky), 1).any()


def test_training_gradients_flow_through_the_context():
    """The new state of the last token depends on earlier tokens (as keys) differentiably."""
    model = make_dynamics(jax.random.key(0))
    last = lambda x: jnp.sum(dynamics.step(model, x)[-1])
    assert float(jnp.abs(jax.grad(last)(X)[0]).max()) > 1e-4


def energy_change(model, x, token, size):
    """Change of a token's energy over one small step, its context held fixed."""
    context = model.norm(x)

    def energy(x):
        g = model.norm(x)
        query = context.at[token].set(g[token])
        return sum(e(query, context)[token] for e in model.energies.values())

    moved = x.at[token].set(dynamics.step(model, x, size)[token])
    return float(energy(moved) - energy(x))


CONDITIONS = {"gamma": "layer_norm", "psd": "none"}


def with_float64(test):
    """Energy changes of small steps drown in float32."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


def descends(rate, norm, width, seed, sign=1.0, size=1e-5):
    # Strict, as in the sum of the paper; the proof holds the context, and so a self key, fixed.
    sizes = Sizes(D=width, H=2, Y=2, M=2 * width)
    parts = {"norm": norm, "rate": rate, "strict": True, "sizes": sizes, "dtype": jnp.float64}
    model = make_dynamics(jax.random.key(seed), **parts)
    model = model._replace(eta=sign * model.eta)
    x = jax.random.normal(jax.random.key(seed + 1), (4, width), dtype=jnp.float64)
    return [energy_change(model, x, token, size) for token in range(4)]


@pytest.mark.parametrize("rate", CONDITIONS)
@with_float64
def test_energy_descends_at_small_steps(rate):
    """Propositions 2.1 (gamma with LayerNorm) and 2.2 (psd without a norm)."""

    @given(width=st.sampled_from([3, 5, 8]), seed=st.integers(0, 2**20))
    @settings(max_examples=10, deadline=None)
    def check(width, seed):
        changes = descends(rate, CONDITIONS[rate], width, seed)
        assert max(changes) <= 1e-9
        assert sum(changes) < -1e-9, "and it does fall"

    check()


@with_float64
def test_energy_rises_when_the_condition_is_broken():
    assert max(descends("gamma", "layer_norm", 6, 0, sign=-1.0)) > 1e-9
    rises = [max(descends("full", "none", 6, seed)) > 1e-9 for seed in range(5)]
    assert any(rises)


def test_step_keeps_the_dtype():
    model = make_dynamics(jax.random.key(0))
    assert dynamics.step(model, X).dtype == jnp.float32
    half = model._replace(eta=model.eta.astype(jnp.bfloat16))
    assert dynamics.step(half, X).dtype == jnp.float32


def test_gradient_is_of_the_query_only():
    energy = lambda query, context: jnp.sum(query * context, axis=-1)
    chex.assert_trees_all_close(dynamics.energy_gradient(energy, X), X)
