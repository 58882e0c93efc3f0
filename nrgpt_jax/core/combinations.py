"""Several energies as one: how the terms of a token become its energy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.array_types import Params
from nrgpt_jax.core.parameters import Specs, positive
from nrgpt_jax.core.registry import Registry

Scalar = Float[Array, ""]


class Combination(NamedTuple):
    """How the energies (E,) of a token's terms become its energy `(params, energies) -> ()`.

    `exact` declares that its `jax.grad` is all of its change, as of an `Energy`.
    """

    function: Callable[[Params, Float[Array, "E"]], Scalar]
    specs: Specs
    exact: bool = False


COMBINATIONS: Registry[Combination] = Registry("combination of energies")


def combination(name: str, specs: Specs, *, exact: bool = False):
    """Registers a way to combine energies, a choice of `config.model.combination`."""
    return COMBINATIONS.register(name, lambda function: Combination(function, specs, exact))


@combination("sum", {}, exact=True)
def total(params: Params, energies: Float[Array, "E"]) -> Scalar:
    """E = sum_k E_k (the paper)."""
    del params
    return jnp.sum(energies)


@combination("mixture", {"tau": positive(1.0)}, exact=True)
def mixture(params: Params, energies: Float[Array, "E"]) -> Scalar:
    """E = -tau log sum_k exp(-E_k / tau): the lowest term moves the token most."""
    return -params["tau"] * jax.nn.logsumexp(-energies / params["tau"])
