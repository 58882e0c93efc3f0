"""The recurrent dynamics: tokens roll down their energies, one block applied T times.

    g = norm(x)
    x <- x - c_t eta dE/dg        E_A = sum of the energy terms of token A

All functions are written for one sequence, states (N,D); batch them with `jax.vmap`.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.array_types import States, TokenEnergies
from nrgpt_jax.core.rates import apply_rate

EnergyTerm = Callable[[States, States], TokenEnergies]
"""An energy with its parameters bound: (g_query, g_context) -> one value a token."""


class Dynamics(NamedTuple):
    """Everything that one step needs: energy terms by name, the norm, the inference rate."""

    energies: Mapping[str, EnergyTerm]
    norm: Callable[[States], States]
    eta: jax.Array


class Trajectory(NamedTuple):
    """States and per-token energies before every step and after the last one."""

    states: Float[Array, "T+1 N D"]
    energies: Mapping[str, Float[Array, "T+1 N"]]


def energy_gradient(energy: EnergyTerm, g: States) -> States:
    """Row A is the gradient of token A's own energy in its own state, dE_A/dg_A.

    Only the query argument is differentiated. The context argument is the same g, and outer
    (training) gradients flow through it.
    """
    return jax.grad(lambda query: jnp.sum(energy(query, g)))(g)


def step(dynamics: Dynamics, x: States, scale: jax.Array | float = 1.0) -> States:
    """One step of every token down its energy, x - scale * eta dE/dg."""
    g = dynamics.norm(x)
    gradients = [energy_gradient(energy, g) for energy in dynamics.energies.values()]
    gradient = functools.reduce(jnp.add, gradients)
    return x - scale * apply_rate(dynamics.eta, gradient).astype(x.dtype)


def rollout(
    dynamics_at: Callable[[jax.Array | None], Dynamics],
    x: States,
    scales: Float[Array, "T"],
    keys: jax.Array | None = None,
    unroll: int = 1,
) -> States:
    """The state after T = len(scales) steps: one `lax.scan`, one compiled step.

    `dynamics_at(key)` gives the dynamics of a step; `keys` (T,) feed its dropout, or are None.
    `unroll` steps are compiled as one: the same values, without copies of what is kept for the
    gradient, at the price of compilation time.
    """

    def body(x, scale_and_key):
        scale, key = scale_and_key
        return step(dynamics_at(key), x, scale), None

    return jax.lax.scan(body, x, (scales, keys), unroll=unroll)[0]


def trajectory(dynamics: Dynamics, x: States, scales: Float[Array, "T"]) -> Trajectory:
    """The whole path of T = len(scales) steps, with the energy of every token on it."""

    def energies(x):
        g = dynamics.norm(x)
        return {name: energy(g, g) for name, energy in dynamics.energies.items()}

    def body(x, scale):
        return step(dynamics, x, scale), (x, energies(x))

    last, (states, values) = jax.lax.scan(body, x, scales)
    append = lambda path, end: jnp.concatenate([path, end[None]])
    values = jax.tree.map(append, values, energies(last))
    return Trajectory(append(states, last), {**values, "total": sum(values.values())})
