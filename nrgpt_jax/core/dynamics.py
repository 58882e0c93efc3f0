"""The recurrent dynamics: tokens roll down their energies, one block applied T times.

    g = norm(x)
    x <- x - c_t eta dE/dg        E_A = sum of the energy terms of token A

States are (N,D). An energy may treat the N tokens as one sequence, or as several of equal length
one after the other: nothing else here looks at more than one token.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.array_types import States, TokenEnergies
from nrgpt_jax.core.rates import apply_rate

REMAT = ("none", "step", "full")

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
    *,
    unroll: int = 1,
    remat: str = "none",
) -> States:
    """The state after T = len(scales) steps: one `lax.scan`, one compiled step.

    Args:
      dynamics_at: gives the dynamics of a step from its key, or from None.
      x: the states before the first step.
      scales: c_t of every step.
      keys: (T,) random keys, for dropout, or None.
      unroll: this many steps are compiled as one: the same values, without copies of what is
        kept for the gradient, at the price of compilation time.
      remat: what training keeps. `none`: everything it needs. `step`: the state before each
        step, the rest is computed again. `full`: the states at about sqrt(T) steps.
    """

    def body(x, scale_and_key):
        scale, key = scale_and_key
        return step(dynamics_at(key), x, scale), None

    if remat != "none":
        body = jax.checkpoint(body)
    inputs = (scales, keys)
    steps = lambda x, inputs: jax.lax.scan(body, x, inputs, unroll=unroll)
    if remat == "full":
        chunk = math.isqrt(len(scales))
        whole = len(scales) // chunk * chunk
        chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk), inputs)
        x = jax.lax.scan(jax.checkpoint(steps), x, chunks)[0]
        inputs = jax.tree.map(lambda leaf: leaf[whole:], inputs)
    return steps(x, inputs)[0]


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
