"""What is measured along a path, and what is promised of a model by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, make_dynamics
from descent_helpers import follow, well, with_float64

from nrgpt_jax.core import evidence
from nrgpt_jax.core.block import block, start
from nrgpt_jax.core.certificates import Parts, guarantee
from nrgpt_jax.core.descent import energy_in_context
from nrgpt_jax.core.evidence import SCALES


def bowl(key, c, rule="descent"):
    del key
    return (well(jnp.ones((2, 3), jnp.float64), jnp.zeros((3, 3)), c, rule),)


@pytest.mark.parametrize("c", [0.03, 0.5, 1.9, 40.0])
@with_float64
def test_largest_scale_is_the_known_one(c):
    """x <- (1 - s c) x lowers |x|^2 / 2 just as long as s c <= 2."""
    _, found = follow(bowl, number=c)
    expected = max(scale for scale in SCALES if scale * c <= 2.0)
    expected = np.inf if expected == max(SCALES) else expected
    np.testing.assert_allclose(found.largest_scales, expected)
    np.testing.assert_allclose(found.slopes, -3 * c, rtol=1e-6)
    np.testing.assert_allclose(found.changes, 1.5 * ((1 - c) ** 2 - 1), rtol=1e-6)
    assert bool(found.rises.any()) == (c > 2.0)


@pytest.mark.parametrize("rule", ["descent", "momentum"])
@with_float64
def test_a_move_that_goes_on_is_measured_as_it_is(rule):
    """The heavy ball rolls through the minimum and up again, where plain descent only falls."""
    path, found = follow(bowl, rule, number=0.7, scales=[1.0] * 6)
    np.testing.assert_allclose(found.changes, np.diff(path.energies["total"], axis=0), atol=1e-12)
    assert bool(found.rises.any()) == (rule == "momentum")
    assert bool(found.uphill.any()) == (rule == "momentum")


def gated(key, number):
    del number
    x = jax.random.normal(key, (1, 5, SIZES.D), jnp.float64)
    return (make_dynamics(key, x, ("full_rank", "FFG"), norm="none", rate="psd", strict=True),)


@with_float64
def test_slopes_are_those_of_the_whole_energy_where_gradients_leave_a_gate_out():
    short = 2.0**-12  # of the steps: what they change is what slopes say
    found = follow(gated, scales=[short] * 4)[1]
    np.testing.assert_allclose(found.changes, found.slopes, rtol=2e-2, atol=1e-7)


def searching(key, number, halvings):
    del number
    x = jax.random.normal(key, (1, 5, SIZES.D), jnp.float64)
    parts = ("full_rank", "FFG_exact"), "bare_layer_norm", "full"
    made = make_dynamics(key, x, *parts, strict=True, change=lambda eta: 9.0 * eta)
    return (made._replace(line_search=halvings),)


@with_float64
def test_a_line_search_makes_the_largest_share_of_a_move_that_does_not_raise_the_energy():
    rises = [follow(searching, n, scales=[1.0] * 6)[1].rises.any() for n in (0, 2)]
    assert rises == [True, False]
    dynamics = searching(jax.random.key(0), 1.0, 2)[0]
    state = start(dynamics)
    whole = block(dynamics._replace(line_search=0), state)[1]
    found = block(dynamics, state)[1]
    shares = jnp.linalg.norm(found.move, axis=-1) / jnp.linalg.norm(whole.move, axis=-1)
    energy_at = energy_in_context(dynamics, state)
    for token, share in enumerate(np.round(shares[0], 6)):
        assert share in (0.0, 0.25, 0.5, 1.0)
        for longer in (s for s in (0.25, 0.5, 1.0) if s > share):
            assert (energy_at(state.x + longer * whole.move) > whole.total)[0, token]


def test_rest_and_settling():
    one = jnp.array([[0.5, 0.5, 0.5], [0.0, 0.2, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.3]])
    speeds = jnp.stack([jnp.zeros_like(one), one], axis=1)  # the first sequence is at rest
    assert evidence.settling_steps(speeds, 0.1).tolist() == [[0, 0, 0], [1, 2, 4]]
    strict = evidence.context_converged(speeds, 0.1, strict=True)
    assert strict[:, 1].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
        [True, True, True],
    ]
    inclusive = evidence.context_converged(speeds, 0.1, strict=False)
    assert inclusive[1, 1].tolist() == [True, False, False]
    assert strict[:, 0].all()
    assert inclusive[:, 0].all()
    g = jnp.array([[[3.0, 4.0]], [[3.0, 4.5]], [[3.0, 4.5]]])[:, None]
    np.testing.assert_allclose(evidence.relative_speeds(g), [[[0.1]], [[0.0]]], rtol=1e-6)


def climb(key, c):
    del key
    return (well(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.eye(2), c),)


def test_a_rise_counts_only_where_the_context_is_at_rest():
    path, found = follow(climb, number=-0.5, scales=[1.0] * 3)
    assert (np.diff(path.energies["total"], axis=0) > 0).all()
    assert found.rises.all()
    assert found.rises_converged[:, 0].all()
    assert not found.rises_converged[:, 1].any()


def test_what_is_not_a_number_has_not_fallen():
    _, found = follow(climb, number=np.nan)
    assert found.rises.all()
    assert (found.largest_scales == 0.0).all()


ONES, UNEVEN = np.ones(3), np.array([0.5, 1.0, -2.0])
MATRIX = np.array([[1.0, 3.0, 0.0], [-3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
NEGATIVE = MATRIX - 0.1 * np.eye(3)
PROJECTED, MOMENTUM, BLOCKS = {"rule": "projected"}, {"rule": "momentum"}, {"blocks": 2}
INCLUSIVE = {"strict": False}
SEARCH = {"line_search": 2}


@pytest.mark.parametrize(
    ("norm", "gain", "eta", "options", "name", "word"),
    [
        ("layer_norm", UNEVEN, 0.3 * UNEVEN, {}, "2.1", "c = 0.3"),
        ("layer_norm", UNEVEN, np.diag(0.3 * UNEVEN), {}, "2.1", "layer_norm"),
        ("rms_norm", UNEVEN, -0.3 * UNEVEN, {}, None, "c > 0"),
        ("layer_norm", UNEVEN, np.array(0.3), {}, None, "not c diag(gamma)"),
        ("bare_layer_norm", ONES, np.array(0.3), {}, "2.1", "bare_layer_norm"),
        ("bare_layer_norm", ONES, np.array(0.3), INCLUSIVE, None, "mask is inclusive"),
        ("bare_layer_norm", ONES, MATRIX, {}, None, "not c diag(gamma)"),
        ("none", ONES, MATRIX, {}, "2.2", "positive semi-definite"),
        ("none", ONES, NEGATIVE, {}, None, "eigenvalue -0.1"),
        ("none", ONES, np.array([1.0, 2.0, -0.5]), {}, None, "eigenvalue -0.5"),
        ("none", ONES, MATRIX, INCLUSIVE, None, "mask is inclusive"),
        ("layer_norm", UNEVEN, MATRIX, PROJECTED, "2.2 (projected)", "positive semi-definite"),
        ("rms_norm", UNEVEN, np.array(0.3), PROJECTED, "2.2 (projected)", "projected gradient"),
        ("layer_norm", UNEVEN, NEGATIVE, PROJECTED, None, "eigenvalue -0.1"),
        ("rms_norm", UNEVEN, 0.3 * UNEVEN, PROJECTED, None, "eigenvalue -0.6"),
        ("layer_norm", UNEVEN, MATRIX, PROJECTED | INCLUSIVE, None, "mask is inclusive"),
        ("layer_norm", UNEVEN, 0.3 * UNEVEN, MOMENTUM, None, "rule momentum"),
        ("none", ONES, MATRIX, MOMENTUM, None, "rule momentum"),
        ("layer_norm", UNEVEN, 0.3 * UNEVEN, BLOCKS, None, "2 blocks"),
        ("none", ONES, MATRIX, BLOCKS, None, "2 blocks"),
        ("none", ONES, MATRIX, {"energies": {"feedforward": "FFG"}}, None, "gradient of FFG"),
        ("bare_layer_norm", ONES, NEGATIVE, SEARCH, "line search", "shortened"),
        ("bare_layer_norm", ONES, NEGATIVE, SEARCH | INCLUSIVE, None, "mask is inclusive"),
        ("bare_layer_norm", ONES, MATRIX, SEARCH | BLOCKS, None, "2 blocks"),
    ],
)
def test_guarantee_names_the_proposition_and_the_reason(norm, gain, eta, options, name, word):
    found = guarantee(Parts(norm, gain, eta, **{"energies": {}, **options}))
    assert found.proposition == name
    assert word in found.reason
