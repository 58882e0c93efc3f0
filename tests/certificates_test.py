"""Propositions 2.1 and 2.2 as properties, each shown to fail when its condition is broken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import dynamics_of, make_dynamics
from descent_helpers import follow, well, with_float64
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import slow, slow_but

from nrgpt_jax.core.block import bind, block, rollout, start
from nrgpt_jax.core.certificates import Parts, guarantee
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.parameters import Sizes

PAPER = ("full_rank", "FF2W")
OTHERS = ("low_rank_rope", "injection", "leak")
CONDITIONS = {
    "2.1": ("gamma", "layer_norm", "descent", PAPER),
    "2.1, other energies": ("scalar", "bare_layer_norm", "descent", OTHERS),
    "2.2": ("psd", "none", "descent", PAPER),
    "2.2, projected by layer_norm": ("psd", "layer_norm", "projected", PAPER),
    "2.2, projected by rms_norm": ("psd", "rms_norm", "projected", PAPER),
    "2.2, on the sphere": ("psd", "layer_norm", "sphere", PAPER),
}
WIDTHS = dict.fromkeys(CONDITIONS, 3) | {  # the others are slow
    "2.1, other energies": 8,
    "2.2, projected by rms_norm": None,
}
SEEDS = st.integers(0, 2**20)
STEPS = st.lists(st.floats(1e-6, 1e-4), min_size=4, max_size=4)  # sizes of four steps


def cases_and_widths():
    for case, quick in WIDTHS.items():
        for width in (3, 8):
            yield (case, width) if width == quick else slow(case, width)


def random_model(key, numbers, width, rate, norm, rule, energies=PAPER, strict=True):
    """A random model whose rate is turned around (sign) and made uneven or skewed (size)."""
    sign, size = numbers
    x = jax.random.normal(jax.random.fold_in(key, 1), (1, 4, width), dtype=jnp.float64)
    if rule == "sphere":  # small steps do not lead there: its promise is of states that are on it
        x = x / jnp.std(x, axis=-1, keepdims=True)

    def change(eta):
        if eta.ndim == 1:  # a diagonal, positive as before
            eta = eta * jnp.exp(jnp.linspace(0.0, size, width))
        if eta.ndim == 2:  # the symmetric part stays what it is
            skew = size * jax.random.normal(key, eta.shape, jnp.float64)
            eta = eta + skew - skew.T
        return sign * eta

    parts = {"norm": norm, "rate": rate, "rule": rule, "energies": energies, "strict": strict}
    sizes = Sizes(D=width, H=2, Y=2, M=2 * width)
    return (make_dynamics(key, x, **parts, sizes=sizes, change=change),)


@pytest.mark.parametrize(("case", "width"), cases_and_widths())
@with_float64
def test_energy_falls_where_a_proposition_promises_it(case, width):
    """At every small step, for every token, with its context held fixed."""

    @given(steps=STEPS, seed=SEEDS)
    @example(steps=[6e-5, 9e-5, 1e-4, 9e-5], seed=524)  # begins far from the sphere
    @settings(max_examples=15, deadline=None)
    def check(steps, seed):
        choices = (width, *CONDITIONS[case])
        _, found = follow(random_model, *choices, seed=seed, number=(1.0, 0.0), scales=steps)
        assert not np.any(found.slopes > 1e-12)
        assert not found.uphill.any()
        assert not found.rises.any()
        assert float(found.changes.sum()) < 0.0, "and it does fall"
        assert float(found.largest_scales.min()) >= 1.0
        # Token 0 has no context, so its energy falls along the path itself.
        assert found.context_converged[:, 0].all()
        assert not found.rises_converged[:, 0].any()

    check()


BROKEN_QUICKLY = (
    *("2.1, another sign", "2.1, not the gain", "2.2, behind a norm", "2.2, unconstrained"),
    *("2.2, another sign", "2.2, on the sphere, unconstrained"),
)
BROKEN = {
    "2.1, another sign": ((-1.0, 0.0), *CONDITIONS["2.1"]),
    "2.1, not the gain": ((1.0, 5.0), *CONDITIONS["2.1"]),
    "2.1, unconstrained": ((1.0, 0.0), "full", "layer_norm", "descent"),
    "2.2, behind a norm": ((1.0, 5.0), "psd", "layer_norm", "descent"),
    "2.2, unconstrained": ((1.0, 0.0), "full", "none", "descent"),
    "2.2, another sign": ((-1.0, 0.0), *CONDITIONS["2.2"]),
    "2.2, projected, unconstrained": ((1.0, 0.0), "full", "layer_norm", "projected"),
    "2.2, on the sphere, unconstrained": ((1.0, 0.0), "full", "layer_norm", "sphere"),
    "2.2, projected, another sign": ((-1.0, 0.0), *CONDITIONS["2.2, projected by rms_norm"]),
}


@pytest.mark.ci
@pytest.mark.parametrize("case", slow_but(BROKEN_QUICKLY, BROKEN))
@with_float64
def test_energy_rises_when_a_condition_is_broken(case):
    numbers, *choices = BROKEN[case]
    steps = {"number": numbers, "scales": [1e-4] * 4}
    found = [follow(random_model, 3, *choices, seed=seed, **steps)[1] for seed in range(10)]
    assert any(f.rises.any() and f.largest_scales.min() == 0.0 for f in found)


# On the sphere it makes a step as long as the sphere is wide; what the norm's epsilon lets the
# energy see of the length of x then counts.
@pytest.mark.ci
@pytest.mark.parametrize("case", [c for c in CONDITIONS if "2.2" in c and "sphere" not in c])
@with_float64
def test_a_large_skew_part_is_no_harm_without_a_norm_or_behind_its_projection(case):
    steps = {"number": (1.0, 5.0), "scales": [1e-5] * 4}
    for seed in range(10):
        _, found = follow(random_model, 3, *CONDITIONS[case], seed=seed, **steps)
        assert not found.rises.any()
        assert not found.uphill.any()


@pytest.mark.ci
@pytest.mark.parametrize("strict", [True, False])
@with_float64
def test_the_mask_is_a_condition(strict):
    """A token in its own context also moves as a key of its own, which no gradient sees."""
    choices = 3, *CONDITIONS["2.1"], *([] if strict else [strict])
    steps = {"number": (1.0, 0.0), "scales": [1e-3] * 4}
    rises = []
    for seed in range(20):
        path, _ = follow(random_model, *choices, seed=seed, **steps)
        rises.append(np.any(np.diff(path.energies["total"][:, 0]) > 1e-12))
    assert any(rises) != strict


# Toys with known minima -------------------------------------------------------------------------


def two_tokens(key, c, width):
    """Token 1 attends to token 0, which never moves: E_1 = -g_1 . J^T g_0, behind an RMSNorm.

    On the ellipsoid |g_1 / gamma| = sqrt(D) its minimum is -sqrt(D) |gamma * (J^T g_0)|.
    """
    keys = jax.random.split(key, 3)
    gain = jax.random.uniform(keys[0], (width,), jnp.float64, 0.5, 2.0)
    one = jnp.ones(1, jnp.float64)
    matrix = jax.random.normal(keys[1], (1, width, width), jnp.float64)
    params = {"J": matrix, "alpha": one, "beta": one[0]}
    terms = {"attention": bind(ENERGIES["full_rank"], params, dtype="float64")}
    x = jax.random.normal(keys[2], (1, 2, width), jnp.float64)
    norm = {"norm": "rms_norm", "norm_params": {"gain": gain}}
    model = dynamics_of(terms, x, c * gain, **norm, strict=True)
    g_0 = model.norm.function(x)[0, 0]
    minimum = -jnp.sqrt(width) * jnp.linalg.norm(gain * (matrix[0].T @ g_0))
    return model, minimum


@pytest.mark.ci
@pytest.mark.parametrize("width", slow_but([3], [3, 2, 6]))
@with_float64
def test_two_tokens_roll_to_the_known_minimum(width):
    """Proposition 2.1 for whole trajectories: token 0 is at rest, so token 1 falls all the way."""

    @given(c=st.floats(0.02, 0.2), seed=SEEDS)
    @settings(max_examples=15, deadline=None)
    def check(c, seed):
        path, seen, minimum = follow(two_tokens, width, seed=seed, number=c, scales=np.ones(20))
        assert seen.context_converged.all()
        assert not seen.rises.any()
        assert float(jnp.max(jnp.diff(path.energies["total"][:, 1]))) <= 1e-9
        end = ends_of(two_tokens, width)(jax.random.key(seed), jnp.asarray(c))
        np.testing.assert_allclose(end, minimum, rtol=1e-2)
        assert float(end) >= float(minimum) * (1 + 1e-9)

    check()


@functools.cache
def ends_of(build, *choices, steps=20_000):
    """A compiled `(key, number) -> energy of the last token` after many steps."""

    def end(key, number):
        model, *_ = build(key, number, *choices)
        step = lambda state, _: (block(model, state)[0], None)
        state, _ = rollout(step, start(model), jnp.arange(steps))
        return block(model, state)[1].total[0, -1]

    return jax.jit(end)


def cascade(key, skew, width):
    """A well behind a rate whose symmetric part is positive; steps half of what still descends."""
    keys = jax.random.split(key, 4)
    s, r, matrix = (jax.random.normal(k, (width, width), jnp.float64) for k in keys[:3])
    eta = s @ s.T / width + 0.5 * jnp.eye(width) + skew * (r - r.T)
    least = jnp.linalg.eigvalsh((eta + eta.T) / 2)[0]
    eta = eta * least / jnp.linalg.norm(eta, 2) ** 2
    x = jax.random.normal(keys[3], (3, width), jnp.float64)
    return well(x, 0.5 * matrix, eta), eta


@pytest.mark.parametrize("width", slow_but([4], [4, 2]))
@with_float64
def test_a_cascade_reaches_the_known_minimum_without_a_norm(width):
    """Proposition 2.2: the symmetric part of eta is positive, its skew part is anything."""

    @given(skew=st.floats(-1.0, 1.0), seed=SEEDS)
    @settings(max_examples=15, deadline=None)
    def check(skew, seed):
        one = np.ones(20)
        _, seen, eta = follow(cascade, width, seed=seed, number=skew, scales=one)
        promise = guarantee(Parts("none", np.ones(width), np.asarray(eta), {}))
        assert promise.proposition == "2.2"
        assert not seen.rises.any()
        end = ends_of(cascade, width)(jax.random.key(seed), jnp.asarray(skew))
        assert float(end) < 1e-9, "the last token is at its minimum, 0, after all before it"

    check()
