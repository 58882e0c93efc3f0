"""Inference rates eta: the scalar, diagonal (D,) or matrix (D,D) that a gradient is multiplied by.

Each rate is a function `eta(params, gain)` of its parameters and of the gain of the norm. What a
rate guarantees, and of which rule and norm, `core.certificates` says.
Source: NRGPT (arXiv 2512.16762), section 2; Propositions 2.1 and 2.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import BatchStates, Params
from nrgpt_jax.core.parameters import INIT_STD, ParameterSpec, Specs, matrix, positive
from nrgpt_jax.core.registry import Registry
from nrgpt_jax.ops import accumulator_type


class Rate(NamedTuple):
    """An inference rate: eta, its parameters by its initial size, and what it promises."""

    eta: Callable[[Params, jax.Array], jax.Array]
    specs: Callable[[float], Specs]
    guarantee: str  # in a sentence
    constrained: bool = True  # is kept in full precision, because a guarantee rests on its values


RATES: Registry[Rate] = Registry("inference rate")


def apply_rate(eta: jax.Array, gradient: BatchStates) -> BatchStates:
    """eta @ gradient_A for every token A; eta is (), (D,) or (D,D).

    A matrix in a narrow type multiplies in that type and adds up in float32; in float32 it
    multiplies exactly, also on accelerators whose default is less.
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
