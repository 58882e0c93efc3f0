"""Inference rates eta: how a token's energy gradient becomes its update, x <- x - eta dE/dg.

Each rate is a function `eta(params, gain)` that returns a scalar, a diagonal (D,) or a matrix
(D,D), and `apply_rate` multiplies a gradient by it. `guarantee` says when the energy falls, for
small steps and a context held fixed (Propositions 2.1 and 2.2 of the paper).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import Params, States
from nrgpt_jax.core.parameters import INIT_STD, ParameterSpec, Sizes, Specs, constant, matrix
from nrgpt_jax.core.registry import Registry


class Rate(NamedTuple):
    """An inference rate: eta, its parameters given (sizes, initial value), its guarantee."""

    eta: Callable[[Params, jax.Array], jax.Array]
    specs: Callable[[Sizes, float], Specs]
    guarantee: str


RATES: Registry[Rate] = Registry("inference rate")


def apply_rate(eta: jax.Array, gradient: States) -> States:
    """eta @ gradient_A for every token A; eta is (), (D,) or (D,D), gradient (N,D)."""
    gradient = gradient.astype(eta.dtype)
    if eta.ndim == 2:
        return gradient @ eta.T
    return (eta[None] if eta.ndim == 1 else eta) * gradient


def _noisy_identity(value: float, size: int) -> ParameterSpec:
    """sqrt(value) I + N(0, 0.02), so that S S^T starts near value * I."""

    def init(key, shape, dtype=jnp.float32):
        noise = INIT_STD * jax.random.normal(key, shape, dtype)
        return jnp.sqrt(value).astype(dtype) * jnp.eye(size, dtype=dtype) + noise

    return ParameterSpec((size, size), init)


def _log(value: float, *shape: int) -> ParameterSpec:
    """The logarithm of a positive quantity that is `value` at initialisation."""
    return constant(math.log(value), *shape)


RATES.add(
    "full",
    Rate(
        lambda params, gain: params["eta"],
        lambda s, value: {"eta": matrix(s.D, s.D)},
        "none: eta is unconstrained",
    ),
)
RATES.add(
    "gamma",
    Rate(
        lambda params, gain: jnp.exp(params["log_c"]) * gain,
        lambda s, value: {"log_c": _log(value)},
        "Proposition 2.1, strict mask: eta = c diag(gamma), c > 0, gamma the gain of the norm",
    ),
)
RATES.add(
    "psd",
    Rate(
        lambda params, gain: params["S"] @ params["S"].T + params["R"] - params["R"].T,
        lambda s, value: {"S": _noisy_identity(value, s.D), "R": matrix(s.D, s.D)},
        "Proposition 2.2, strict mask: eta + eta^T is positive semi-definite; needs norm none",
    ),
)
RATES.add(
    "diagonal",
    Rate(
        lambda params, gain: jnp.exp(params["log_c"]),
        lambda s, value: {"log_c": _log(value, s.D)},
        "Proposition 2.2, strict mask: positive diagonal; needs norm none",
    ),
)
RATES.add(
    "scalar",
    Rate(
        lambda params, gain: jnp.exp(params["log_c"]),
        lambda s, value: {"log_c": _log(value)},
        "Propositions 2.1 and 2.2, strict mask: positive scalar; norm none or a gain of one",
    ),
)
RATES.add(
    "identity",
    Rate(
        lambda params, gain: jnp.ones((), gain.dtype),
        lambda s, value: {},
        "Propositions 2.1 and 2.2, strict mask: eta = 1; norm none or a gain of one",
    ),
)
