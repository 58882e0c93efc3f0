"""The blocks of a step's Jacobian: what they are, their spectral radii, and whom they attract."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import make_dynamics
from descent_helpers import with_float64
from marks import slow_but

from nrgpt_jax.core import convergence
from nrgpt_jax.core.block import block, start
from nrgpt_jax.core.parameters import Sizes

WIDTH, COUNT = 4, 5
SMALL = Sizes(D=WIDTH, H=2, Y=2, M=8)
CASES: dict[str, dict[str, Any]] = {
    "paper": {"rate": "full", "norm": "bare_layer_norm", "strict": True},
    "own key": {"rate": "full", "norm": "layer_norm", "strict": False},
    "rotary": {"energies": ("low_rank_rope", "injection"), "rate": "psd", "strict": False},
    "sphere": {"rate": "psd", "norm": "rms_norm", "rule": "sphere", "strict": True},
    "scalar": {"rate": "scalar", "norm": "layer_norm", "strict": True},
}


def prepared(case, size=1.0):
    """Dynamics with a rate of some size, and a state."""
    x = jax.random.normal(jax.random.key(7), (1, COUNT, WIDTH), jnp.float64)
    options = {**CASES[case], "change": lambda eta: size * eta, "implementation": "autodiff"}
    dynamics = make_dynamics(jax.random.key(1), x, sizes=SMALL, **options)
    return dynamics, start(dynamics)


@pytest.mark.ci
@pytest.mark.parametrize("case", slow_but(["sphere"], ["paper", "own key", "rotary", "sphere"]))
@with_float64
def test_blocks_are_the_diagonal_of_the_whole_jacobian(case):
    dynamics, state = prepared(case)

    @jax.jit
    def all_of(x):
        """One step in both ways, the blocks of its Jacobian, and all of it."""
        function = convergence.own_step(dynamics, state)
        step = lambda flat: block(dynamics, state._replace(x=flat.reshape(x.shape)))[0].x
        blocks, whole = convergence.token_jacobians(function, x), jax.jacfwd(step)(x.reshape(-1))
        return function(x), step(x), blocks[0], whole

    own, plain, found, whole = map(np.asarray, all_of(state.x))
    chex.assert_trees_all_close(own, plain, rtol=1e-9)
    whole = whole.reshape(COUNT, WIDTH, COUNT, WIDTH).swapaxes(1, 2)
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


@pytest.mark.parametrize("case", slow_but(["sphere"], ["paper", "own key", "sphere"]))
@with_float64
def test_power_iteration_finds_the_spectral_radius(case):
    dynamics, state = prepared(case)

    @jax.jit
    def radii_and_blocks(x):
        function = convergence.own_step(dynamics, state)
        radii = convergence.spectral_radii(function, x, jax.random.key(0), 2000)
        return radii[0], convergence.token_jacobians(function, x)[0]

    radii, found = map(np.asarray, radii_and_blocks(state.x))
    wanted = [np.abs(np.linalg.eigvals(block)).max() for block in found]
    np.testing.assert_allclose(radii, wanted, rtol=1e-2)


def at_rest(dynamics, steps=3000):
    """Where tokens are after many steps."""
    many = jax.jit(lambda s: jax.lax.fori_loop(0, steps, lambda _, s: block(dynamics, s)[0], s))
    return many(start(dynamics))


def slow_on_the_sphere(size=0.3):
    return prepared("sphere", size)[0]


@with_float64
def test_a_token_that_attracts_comes_back_by_its_radius_a_step():
    """On the sphere with small steps every token comes to rest; pushed, it returns."""
    dynamics = slow_on_the_sphere()
    state, key = at_rest(dynamics), jax.random.key(0)
    found = convergence.attraction(dynamics, state, key, iterations=400)
    assert found.attracts(1e-6).all(), found
    pushed = state._replace(x=state.x + 1e-3 * jax.random.normal(key, state.x.shape, state.x.dtype))

    def further(pushed, _):
        new = block(dynamics, pushed)[0]
        return new, jnp.abs(new.x - state.x).max()

    away = jax.jit(lambda s: jax.lax.scan(further, s, length=200)[1])(pushed)
    assert away[-1] < 1e-5
    slowest = float(found.radius.max())
    np.testing.assert_allclose((away[199] / away[99]) ** 0.01, slowest, rtol=2e-2)


@with_float64
def test_at_rest_is_not_yet_attracting():
    """Uphill: where tokens came to rest, the same landscape upside down throws them off."""
    dynamics = slow_on_the_sphere()
    state = at_rest(dynamics)
    upside_down = slow_on_the_sphere(size=-0.3)
    found = convergence.attraction(upside_down, state, jax.random.key(0), iterations=400)
    assert (found.speed < 1e-6).all()
    assert (found.radius > 1.0).all()
    assert not found.attracts(1e-6).any()


@with_float64
def test_what_energies_do_not_see_is_not_asked():
    """Behind a layer norm x has an eigenvalue of one for its length and its mean, u has not."""
    dynamics, _ = prepared("scalar", size=0.05)
    state = at_rest(dynamics, 400)
    blocks = lambda x: convergence.token_jacobians(convergence.own_step(dynamics, state), x)
    of_x = jax.jit(blocks)(state.x)
    ones = [np.abs(np.linalg.eigvals(block) - 1.0).min() for block in np.asarray(of_x)[0]]
    assert max(ones) < 1e-6
    found = convergence.attraction(dynamics, state, jax.random.key(0), iterations=400)
    assert (found.radius < 0.999).all()


@pytest.mark.ci
@with_float64
def test_many_tokens_are_looked_at_some_at_a_time(monkeypatch):
    dynamics = slow_on_the_sphere()
    state, key = start(dynamics), jax.random.key(0)
    wanted = convergence.attraction(dynamics, state, key, iterations=1500)
    monkeypatch.setattr(convergence, "AT_ONCE", 2)  # three parts of two, the last token twice
    found = convergence.attraction(dynamics, state, key, iterations=1500)
    chex.assert_trees_all_close(found.speed, wanted.speed, rtol=1e-9)
    chex.assert_trees_all_close(found.radius, wanted.radius, rtol=2e-2)


@with_float64
def test_what_moves_does_not_attract():
    dynamics, state = prepared("paper")
    found = convergence.attraction(dynamics, state, jax.random.key(0))
    assert not found.attracts(1e-6).any()
    assert (np.asarray(found.speed) > 1e-3).all()
