"""What is promised falls, whatever the parts: good ones, and ones that declare what is not so."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import make_dynamics
from decoding_helpers import pretrained
from descent_helpers import with_float64
from hypothesis import given, settings
from hypothesis import strategies as st

from nrgpt_jax import analyze
from nrgpt_jax.analysis.examination import examine
from nrgpt_jax.analysis.report import report
from nrgpt_jax.core import evidence
from nrgpt_jax.core.block import COMBINATIONS, block, combination, start
from nrgpt_jax.core.certificates import Parts, alone, certify, check
from nrgpt_jax.core.convergence import attraction
from nrgpt_jax.core.descent import energy_in_context
from nrgpt_jax.core.energies import ENERGIES, energy, feedforward
from nrgpt_jax.core.norms import NORMS, Norm
from nrgpt_jax.core.parameters import Sizes, matrix, vector
from nrgpt_jax.core.rules import RULES, BoundRule, descent, rule
from nrgpt_jax.errors import UserError
from nrgpt_jax.registry import Registry

pytestmark = pytest.mark.ci

SIZES = Sizes(D=4, H=2, Y=2, M=6)
TOKENS = np.array([0, 3, 1, 4, 1, 5, 9, 2])
W = {"W": matrix("D D")}
LAYER = NORMS["bare_layer_norm"]
SKEWED = np.kron(np.eye(2), [[-0.5, 0.9], [-0.9, -0.5]])  # turns by more than a right angle


def keep(params, g, position):
    """What an energy may look at of any token, in its context or not."""
    return g


def squares(params, g):
    return 0.5 * jnp.sum((g @ params["W"]) ** 2)


FACTORS = {
    "uphill": lambda n: -1.0,
    "turning": lambda n: jnp.where(n < 2, 1.0, -1.0),  # downhill at first, and uphill later
}


def scaled_descent(factor, params, eta, norm):
    """Descent, with the update of each step multiplied by a factor."""
    down = descent(params, eta, norm)
    scaled = lambda e, n, x: jnp.asarray(factor(n), eta.dtype) * down.update(e, (), x)[0]
    return BoundRule(lambda x0: jnp.zeros((), jnp.int32), lambda e, n, x: (scaled(e, n, x), n + 1))


def add_parts():
    """Parts of every registry; GOOD are what they declare to be."""
    to = lambda name, declared=True: energy(name, W, key=keep, exact=declared)
    feedforward("TANH", {"W": matrix("M D"), "b": vector("M")}, exact=True)(
        lambda params, g: -jnp.sum(jnp.tanh(params["W"] @ g + params["b"]) ** 2)
    )
    to("UNDECLARED", False)(lambda params, g, context: squares(params, g))
    to("GATE")(lambda params, g, context: jnp.vdot(g, params["W"] @ jnp.tanh(context.g)))
    to("STATE")(lambda params, g, context: jnp.vdot(g, params["W"] @ context.x))
    to("STOPPED")(lambda params, g, context: jnp.vdot(g, jax.lax.stop_gradient(g) ** 3))
    to("OWN_KEY")(lambda params, g, context: jnp.vdot(g, context.keys[context.position] ** 2))
    to("FUTURE")(lambda params, g, context: jnp.vdot(g, params["W"] @ context.keys[-1]))
    late = lambda context: jnp.where(context.position > 6, 9.0, 0.0)
    to("LATE")(  # goes uphill: the gradient leaves more out than it has
        lambda params, g, context: late(context) * jnp.vdot(g - 2.0 * context.g, params["W"][0])
    )
    bare = {"bias": vector("D")}
    norm = lambda name, function, declared=True, sigma=LAYER.sigma: NORMS.add(
        name, Norm(function, LAYER.lagrangian, sigma, bare, declared)
    )
    one = lambda x: jnp.ones((), x.dtype)
    norm("tanh", lambda params, x: jnp.tanh(x) + params["bias"], True, one)
    norm("undeclared", lambda params, x: LAYER.function(params, x), False)
    norm("negated", lambda params, x: -LAYER.function(params, x))
    norm("skewed", lambda params, x: x @ jnp.asarray(SKEWED, x.dtype) + params["bias"], True, one)
    norm("negative_sigma", LAYER.function, True, lambda x: -LAYER.sigma(x))

    for name, factor in FACTORS.items():
        rule(name, {}, follows="dE/dg")(functools.partial(scaled_descent, factor))

    half = lambda params, eta, norm: descent(params, jnp.asarray(0.5, eta.dtype) * eta, norm)
    rule("halved", {}, follows="dE/dg")(half)
    weigh = lambda e: jnp.sum(jax.lax.stop_gradient(e) * e)
    combination("weighed", {}, exact=True)(lambda params, energies: weigh(energies))
    combination("undeclared", {})(lambda params, energies: jnp.sum(energies))


GOOD = {
    "energies": (
        "full_rank",
        "low_rank_rope",
        "FF2W",
        "FF1",
        "FF3",
        "FFG_exact",
        "FFG_first",
        "injection",
        "leak",
        "TANH",
    ),
    "norm": ("layer_norm", "bare_layer_norm", "rms_norm", "none", "tanh"),
    "rule": ("descent", "projected", "sphere", "halved"),
    "combination": ("sum", "mixture"),
}
BAD = {
    "energies": ("UNDECLARED", "GATE", "STATE", "STOPPED", "OWN_KEY", "FUTURE", "FFG"),
    "norm": ("undeclared", "negated", "skewed", "negative_sigma"),
    "rule": ("uphill", "momentum", "turning"),
    "combination": ("weighed", "undeclared"),
}
REGISTRIES: list[Registry] = [ENERGIES, NORMS, RULES, COMBINATIONS]


@pytest.fixture(scope="module", autouse=True)
def _parts():
    before = [set(registry) for registry in REGISTRIES]
    add_parts()
    yield
    for registry, names in zip(REGISTRIES, before, strict=True):
        for name in set(registry) - names:
            registry.remove(name)


def built(key, energies, norm, rule, combination, rate, strict, sign=1.0):
    """Random dynamics of parts, of states where the rule leaves them, and the parts."""
    seen: dict[str, Any] = {}

    def change(eta):  # the gain is known where a promise rests on it
        seen.update(eta=sign * eta, gain=eta if rate == "gamma" else jnp.ones(SIZES.D))
        return seen["eta"]

    x = jax.random.normal(jax.random.fold_in(key, 1), (1, 5, SIZES.D), jnp.float64)
    choices = {"norm": norm, "rule": rule, "combination": combination, "strict": strict}
    options = {"rate": rate, "sizes": SIZES, "implementation": "autodiff", "change": change}
    made = make_dynamics(key, x, energies, **choices, **options)
    terms = dict(zip(made.terms, energies, strict=True))
    made = made._replace(first=x + evidence.resting(made, x))
    return made, Parts(**seen, energies=terms, **choices)


@functools.cache
def compiled(*choices):
    """`(key, term) -> checks` and `key -> which tokens' energies rise` in a short step."""

    def checked(key, term):
        made, _ = built(key, *choices)
        x = jax.random.normal(jax.random.fold_in(key, 2), made.first.shape, jnp.float64)
        return check(alone(made, term) if term else made, x, jax.random.fold_in(key, 3))

    def followed(key):
        made, _ = built(key, *choices)
        state = start(made)
        new, out = block(made, state, 1e-5)
        rounding = 64 * jnp.finfo(jnp.float64).eps * sum(map(abs, out.energies.values()))
        return energy_in_context(made, state)(new.x) - out.total > rounding

    return jax.jit(checked, static_argnums=1), jax.jit(followed)


def promised(key, choices):
    checked, parts = compiled(*choices)[0], built(key, *choices)[1]
    parts = parts._replace(eta=np.asarray(parts.eta), gain=np.asarray(parts.gain))
    return certify(parts, lambda term: checked(key, term))


@st.composite
def models(draw):
    """Good parts, and in half of all models a bad one, another rate or the inclusive mask."""
    bad = draw(st.sampled_from((None, None, None, *BAD, "rate", "mask")))
    one_of = lambda kind: draw(st.sampled_from((BAD if kind == bad else GOOD)[kind]))
    two = one_of("energies"), draw(st.sampled_from(GOOD["energies"]))
    energies = tuple({ENERGIES[name].label: name for name in reversed(two)}.values())
    norm, rule, combination = one_of("norm"), one_of("rule"), one_of("combination")
    of_gain = "gamma" if "gain" in NORMS[norm].specs else "scalar"
    any_positive = norm == "none" or RULES[rule].follows == "dE/dx"
    good = ("psd", "diagonal") if any_positive else (of_gain,)
    rate = draw(st.sampled_from(("full", "psd") if bad == "rate" else good))
    sign = draw(st.sampled_from((1.0, -1.0))) if bad == "rate" else 1.0
    return energies, norm, rule, combination, rate, bad != "mask", sign


@pytest.mark.slow
@with_float64
def test_what_is_promised_falls():
    @given(choices=models(), seed=st.integers(0, 3))
    @settings(max_examples=100, deadline=None)
    def check(choices, seed):
        key = jax.random.key(seed)
        if promised(key, choices).proposition:
            assert not compiled(*choices)[1](key).any()

    check()


def choices_with(kind, name):
    """Parts that would be promised descent if this one were good."""
    choices = {"energies": ("full_rank", "FF2W"), "norm": "bare_layer_norm", "rule": "descent"}
    choices |= {"combination": "sum", "rate": "scalar", kind: name}
    if name == "negative_sigma":
        choices["rule"] = "projected"
    if kind == "energies":
        choices["energies"] = ("full_rank", name)
    return *choices.values(), True


QUICK = ("STOPPED", "turning")
EVERY_BAD = [
    pytest.param(kind, name, marks=[] if name in QUICK else pytest.mark.slow)
    for kind, names in BAD.items()
    for name in names
]


@pytest.mark.parametrize(("kind", "name"), EVERY_BAD)
@with_float64
def test_no_bad_part_is_promised_descent_and_the_reason_names_it(kind, name):
    found = promised(jax.random.key(0), choices_with(kind, name))
    assert found.proposition is None
    assert name in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
@with_float64
def test_good_parts_are_promised_descent(kind):
    for name in set(GOOD[kind]) - {"layer_norm", "rms_norm", "none", "full_rank", "low_rank_rope"}:
        assert promised(jax.random.key(1), choices_with(kind, name)).proposition


def test_a_norm_that_is_not_what_it_declares_has_no_promise():
    trained = pretrained(mask="strict", norm="negated", inference_rate="scalar")
    found = examine(trained, TOKENS, num_steps=2)
    assert found.certificate.proposition is None
    assert found.certificate.uphill > 0.5
    assert found.certificate.contradicted == 0
    assert "NOT guaranteed" in report(found).splitlines()[0]


def test_evidence_against_a_promise_is_said_first_and_fails_the_program(tmp_path, monkeypatch):
    """An energy that is well behaved wherever it was checked, and not where a text is longer."""
    fields = {"norm": "bare_layer_norm", "inference_rate": "scalar", "energies": ("LATE",)}
    trained = pretrained(mask="strict", **fields)
    found = examine(trained, TOKENS, num_steps=2)
    assert found.certificate.proposition == "2.1"
    assert 0 < found.certificate.contradicted <= 2, "steps of the last token"
    assert "contradicted" in report(found).splitlines()[0]
    monkeypatch.setattr("nrgpt_jax.analysis.report.look", lambda *arguments: (trained, found))
    given: Any = {"workdir": str(tmp_path), "prompt": "", "num_steps": 2, "tolerance": 0.01}
    flags: Any = SimpleNamespace(**given, checkpoint="best", out=str(tmp_path / "out"))
    with pytest.raises(UserError):
        analyze.main(flags)
    assert (tmp_path / "out" / "analysis.json").exists()


@with_float64
def test_no_radius_is_given_behind_a_norm_that_the_direction_of_a_state_does_not_determine():
    made, _ = built(jax.random.key(0), *choices_with("norm", "tanh"))
    found = jax.jit(lambda x: attraction(made, start(made)._replace(x=x), jax.random.key(1)))
    assert jnp.isnan(found(made.first).radius).all()
    assert not found(made.first).attracts(10.0).any()
