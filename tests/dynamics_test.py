"""The recurrent dynamics: scan equals loop, no future leaks, a trajectory is what it says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, make_dynamics

from nrgpt_jax.core import dynamics

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

    def own_energy(x_token, token, x):  # with its context held fixed
        g = model.norm(x)
        query = g.at[token].set(model.norm(x.at[token].set(x_token))[token])
        return sum(energy(query, g)[token] for energy in model.energies.values())

    x = path.states[2]
    for token in range(5):
        expected = jax.grad(own_energy)(x[token], token, x)
        chex.assert_trees_all_close(path.gradients[2, token], expected, rtol=1e-4, atol=1e-5)


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


def test_step_keeps_the_dtype():
    model = make_dynamics(jax.random.key(0))
    assert dynamics.step(model, X).dtype == jnp.float32
    half = model._replace(eta=model.eta.astype(jnp.bfloat16))
    assert dynamics.step(half, X).dtype == jnp.float32


def test_gradient_is_of_the_query_only():
    energy = lambda query, context: jnp.sum(query * context, axis=-1)
    chex.assert_trees_all_close(dynamics.energy_gradient(energy, X), X)
