"""Inference rates eta, and descent rules, which turn the gradient of a token's energy into a move.

A rate is a function `eta(params, gain)` of its parameters and the gain of the norm. It returns the
scalar, diagonal (D,) or matrix (D,D) that multiplies the gradient. `core.certificates` states which
rates have a guarantee, and with which rules and norms.

A rule has the interface of an Optax transformation, for the states x (B,N,D) of all tokens:

    state = rule.init(x0)
    move, state = rule.update(gradient, state, x)        gradient: dE_A/dg_A (B,N,D)

The step adds `move`, times the scale of the step, to x. To add a rule, write
`make(params, eta, norm)`, which returns such a pair, and register it with its table.
Source: rates and `descent` are NRGPT (arXiv 2512.16762), section 2, Propositions 2.1 and 2.2; the
other rules are from this library.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import BatchStates, Params
from nrgpt_jax.core.norms import BoundNorm
from nrgpt_jax.core.parameters import (
    INIT_STD,
    ParameterSpec,
    Specs,
    fraction,
    matrix,
    positive,
)
from nrgpt_jax.ops import accumulator_type
from nrgpt_jax.registry import Registry


class Rate(NamedTuple):
    """An inference rate: eta, its parameter table by initial size, and its guarantee."""

    eta: Callable[[Params, jax.Array], jax.Array]
    specs: Callable[[float], Specs]
    guarantee: str  # one sentence
    constrained: bool = True  # kept in full precision, because a guarantee rests on its values


RATES: Registry[Rate] = Registry("inference rate")


def apply_rate(eta: jax.Array, gradient: BatchStates) -> BatchStates:
    """Compute eta @ gradient_A for every token A; eta is (), (D,) or (D,D).

    A matrix of narrow dtype multiplies in that dtype and accumulates in float32. In float32 it
    multiplies in full precision, also on accelerators whose default precision is lower.
    """
    if eta.ndim < 2:
        return (eta[None, None] if eta.ndim == 1 else eta) * gradient.astype(eta.dtype)
    exact = None if jnp.finfo(eta.dtype).bits < 32 else jax.lax.Precision.HIGHEST
    gradient = gradient.astype(eta.dtype)
    wide = accumulator_type(eta)
    return jnp.einsum("bnd,ed->bne", gradient, eta, precision=exact, preferred_element_type=wide)


def _noisy_identity(value: float) -> ParameterSpec:
    """sqrt(value) I + N(0, 0.02), so that S S^T starts near value * I."""

    def init(key, shape, dtype=jnp.float32):
        noise = INIT_STD * jax.random.normal(key, shape, dtype)
        return jnp.sqrt(value).astype(dtype) * jnp.eye(shape[0], dtype=dtype) + noise

    return ParameterSpec(("D", "D"), init, uses=1)


RATES.add(
    "full",
    Rate(
        lambda params, gain: params["eta"],
        lambda size: {"eta": matrix("D D", uses=1)},
        "none: eta is unconstrained",
        constrained=False,
    ),
)
RATES.add(
    "gamma",
    Rate(
        lambda params, gain: params["c"] * gain,
        lambda size: {"c": positive(size)},
        "Proposition 2.1, strict mask: eta = c diag(gamma), c > 0, gamma the gain of the norm",
    ),
)
RATES.add(
    "psd",
    Rate(
        lambda params, gain: params["S"] @ params["S"].T + params["R"] - params["R"].T,
        lambda size: {"S": _noisy_identity(size), "R": matrix("D D", uses=0)},
        "Proposition 2.2, strict mask: eta + eta^T is positive semi-definite; needs norm none, "
        "or the rule projected or sphere",
    ),
)
RATES.add(
    "diagonal",
    Rate(
        lambda params, gain: params["c"],
        lambda size: {"c": positive(size, "D")},
        "Proposition 2.2, strict mask: positive diagonal; needs norm none, or the rule projected "
        "or sphere",
    ),
)
RATES.add(
    "scalar",
    Rate(
        lambda params, gain: params["c"],
        lambda size: {"c": positive(size)},
        "Propositions 2.1 and 2.2, strict mask: positive scalar; norm none or a gain of one, or "
        "the rule projected or sphere",
    ),
)
RATES.add(
    "identity",
    Rate(
        lambda params, gain: jnp.ones((), gain.dtype),
        lambda size: {},
        "Propositions 2.1 and 2.2, strict mask: eta = 1; norm none or a gain of one, or the rule "
        "projected or sphere",
    ),
)


# Rules -------------------------------------------------------------------------------------------


class BoundRule(NamedTuple):
    """A rule with bound parameters."""

    init: Callable[[BatchStates], Any]
    update: Callable[[BatchStates, Any, BatchStates], tuple[BatchStates, Any]]


Follows = Literal["", "dE/dg", "dE/dx"]


class Rule(NamedTuple):
    """A descent rule: `make(params, eta, norm)` binds it, `specs` is the table of `params`.

    `follows` declares, for `core.certificates`, that the move is -eta times this gradient of the
    step, or a positive multiple of it; "" declares nothing. A rule that also moves states at zero
    gradient, such as onto a sphere, declares this for states that it does not move in this way. A
    rule with a state between steps has no guarantee.
    """

    make: Callable[[Params, jax.Array, BoundNorm], BoundRule]
    specs: Specs
    follows: Follows = ""


RULES: Registry[Rule] = Registry("rule of descent")


def rule(name: str, specs: Specs, *, follows: Follows = ""):
    """Register a descent rule, selectable as `config.model.rule`; arguments as in `Rule`."""
    return RULES.register(name, lambda make: Rule(make, specs, follows))


def _no_state(x0: BatchStates) -> tuple[()]:
    del x0
    return ()


@rule("descent", {}, follows="dE/dg")
def descent(params: Params, eta: jax.Array, norm: BoundNorm) -> BoundRule:
    """x <- x - eta dE/dg (the paper)."""
    del params, norm
    return BoundRule(_no_state, lambda gradient, state, x: (-apply_rate(eta, gradient), state))


@rule("momentum", {"mu": fraction(0.5)})
def momentum(params: Params, eta: jax.Array, norm: BoundNorm) -> BoundRule:
    """v <- mu v + eta dE/dg, x <- x - v, with 0 < mu < 1 (the heavy ball)."""
    del norm

    def update(gradient: BatchStates, velocity: BatchStates, x: BatchStates):
        del x
        new = params["mu"] * velocity + apply_rate(eta, gradient).astype(velocity.dtype)
        return -new, new

    return BoundRule(jnp.zeros_like, update)


@rule("projected", {}, follows="dE/dx")
def projected(params: Params, eta: jax.Array, norm: BoundNorm) -> BoundRule:
    """x <- x - eta P diag(gamma) dE/dg, with P the projection in the norm's Jacobian.

    P diag(gamma) = sigma J^T, J = dg/dx = diag(gamma) P / sigma. For a small step dE is then
    -sigma (J^T dE/dg)^T eta (J^T dE/dg): if eta + eta^T is positive semi-definite, the energy falls
    with any norm, also for a full matrix.
    """
    del params

    def update(gradient: BatchStates, state: Any, x: BatchStates):
        pulled = jax.vjp(norm.function, x)[1](gradient.astype(x.dtype))[0]
        return -apply_rate(eta, norm.sigma(x)[..., None] * pulled), state

    return BoundRule(_no_state, update)


@rule("sphere", {}, follows="dE/dx")
def sphere(params: Params, eta: jax.Array, norm: BoundNorm) -> BoundRule:
    """x <- n(n(x) - eta P diag(gamma) dE/dg), n the norm without gain and bias.

    `projected` on the sphere of g, to which states are confined: a step of given length rotates a
    token by the same angle at any depth, energies are bounded below, and a token can converge. For
    a small step the energy falls as with `projected`, from the second step on (the first moves
    states onto the sphere). To first order, n applies P to the move, in which eta follows P.
    """
    del params

    def update(gradient: BatchStates, state: Any, x: BatchStates):
        pulled = jax.vjp(norm.function, x)[1](gradient.astype(x.dtype))[0]
        move = apply_rate(eta, norm.sigma(x)[..., None] * pulled)
        return norm.unit(norm.unit(x) - move.astype(x.dtype)) - x, state

    return BoundRule(_no_state, update)
