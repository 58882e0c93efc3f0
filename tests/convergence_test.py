"""The blocks of a step's Jacobian: what they are, their spectral radii, and whom they attract."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import make_dynamics
from descent_helpers import with_float64

from nrgpt_jax.core import convergence
from nrgpt_jax.core.parameters import Sizes
from nrgpt_jax.core.step import start, step

WIDTH, COUNT = 4, 5
SMALL = Sizes(D=WIDTH, H=2, Y=2, M=8)
CASES = {
    "paper": {"rate": "full", "norm": "bare_layer_norm", "strict": True},
    "own key": {"rate": "full", "norm": "layer_norm", "strict": False},
    "rotary": {"energies": ("low_rank_rope", "injection"), "rate": "psd", "strict": False},
    "sphere": {"rate": "psd", "norm": "rms_norm", "rule": "sphere", "strict": True},
}


def prepared(case):
    """Dynamics, a state, and its step as a function of all numbers in it."""
    x = jax.random.normal(jax.random.key(7), (1, COUNT, WIDTH), jnp.float64)
    dynamics = make_dynamics(jax.random.key(1), x, sizes=SMALL, kernels="plain", **CASES[case])
    state = start(dynamics)
    whole = lambda flat: step(dynamics, state._replace(x=flat.reshape(x.shape)))[0].x.reshape(-1)
    return dynamics, state, jax.jit(jax.jacfwd(whole))(state.x.reshape(-1))


@pytest.mark.parametrize("case", CASES)
@with_float64
def test_blocks_are_the_diagonal_of_the_whole_jacobian(case):
    dynamics, state, whole = prepared(case)
    function = convergence.own_step(dynamics, state)
    chex.assert_trees_all_close(function(state.x), step(dynamics, state)[0].x, rtol=1e-9)
    found = np.asarray(jax.jit(lambda x: convergence.blocks(function, x))(state.x))[0]
    whole = np.asarray(whole).reshape(COUNT, WIDTH, COUNT, WIDTH).swapaxes(1, 2)
    for token in range(COUNT):
        assert not np.abs(whole[token, token + 1 :]).any(), "the future is not seen"
        np.testing.assert_allclose(found[token], whole[token, token], rtol=1e-8, atol=1e-10)
    assert np.abs(whole[3, 1]).max() > 1e-6, "the past is"
    eigenvalues = np.concatenate([np.linalg.eigvals(block) for block in found])
    of_whole = np.linalg.eigvals(whole.swapaxes(1, 2).reshape(COUNT * WIDTH, -1))
    # Multiple eigenvalues (of what the norm does not see) are found to some digits only.
    np.testing.assert_allclose(_sorted(eigenvalues), _sorted(of_whole), atol=1e-5)


def _sorted(values):
    return np.sort(np.abs(values))


@pytest.mark.parametrize("case", ["paper", "own key", "sphere"])
@with_float64
def test_power_iteration_finds_the_spectral_radius(case):
    dynamics, state, _ = prepared(case)
    function = convergence.own_step(dynamics, state)
    radii = convergence.spectral_radii(function, state.x, jax.random.key(0), 2000)
    found = np.asarray(convergence.blocks(function, state.x))[0]
    wanted = [np.abs(np.linalg.eigvals(block)).max() for block in found]
    np.testing.assert_allclose(np.asarray(radii)[0], wanted, rtol=1e-2)


@with_float64
def test_a_token_that_attracts_comes_back_by_its_radius_a_step():
    """On the sphere with small steps every token comes to rest; pushed, it returns."""
    x = jax.random.normal(jax.random.key(7), (1, COUNT, WIDTH), jnp.float64)
    options = {**CASES["sphere"], "change": lambda eta: 0.3 * eta}
    dynamics = make_dynamics(jax.random.key(1), x, sizes=SMALL, kernels="plain", **options)
    once = jax.jit(lambda state: step(dynamics, state)[0])
    state = start(dynamics)
    for _ in range(3000):
        state = once(state)
    key = jax.random.key(0)
    found = convergence.attraction(dynamics, state, key, iterations=400)
    assert found.attracts(1e-6).all(), found
    pushed = state._replace(x=state.x + 1e-3 * jax.random.normal(key, x.shape, x.dtype))
    away = [np.abs(np.asarray(pushed.x - state.x)).max()]
    for _ in range(200):
        pushed = once(pushed)
        away.append(np.abs(np.asarray(pushed.x - state.x)).max())
    slowest = float(found.radius.max())
    assert away[-1] < away[0] * 1e-2
    np.testing.assert_allclose((away[200] / away[100]) ** 0.01, slowest, rtol=2e-2)


@with_float64
def test_what_moves_or_runs_away_does_not_attract():
    dynamics, state, _ = prepared("paper")
    found = convergence.attraction(dynamics, state, jax.random.key(0))
    assert not found.attracts(1e-6).any()
    assert (np.asarray(found.speed) > 1e-3).all()
