"""The recurrent dynamics: tokens roll down their energies, one block applied T times.

    g = norm(x)
    x <- x - c_t eta dE/dg        E_A = sum of the energy terms of token A

States are (N,D). An energy may treat the N tokens as one sequence, or as several of equal length
one after the other: nothing else here looks at more than one token.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.array_types import States, TokenEnergies, at_least_float32
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
    """States, energies and their gradients before every step and after the last one.

    `energies` are those of every token by the names of `Dynamics.energies`, and their `total`.
    `gradients` are dE_A/dx_A of the total: of token A's own energy in its own state, with its
    context held fixed.
    """

    states: Float[Array, "T+1 N D"]
    energies: Mapping[str, Float[Array, "T+1 N"]]
    gradients: Float[Array, "T+1 N D"]


class Slope(NamedTuple):
    """Where tokens stand on their energies: values by name, gradients of the total."""

    energies: Mapping[str, TokenEnergies]
    in_g: States  # dE_A/dg_A, what a step follows
    in_x: States  # dE_A/dx_A


def add(arrays: Iterable[jax.Array]) -> jax.Array:
    """The sum of one or more arrays."""
    return functools.reduce(jnp.add, arrays)


def energy_gradient(energy: EnergyTerm, g: States) -> States:
    """Row A is the gradient of token A's own energy in its own state, dE_A/dg_A.

    Only the query argument is differentiated. The context argument is the same g, and outer
    (training) gradients flow through it.
    """
    return jax.grad(lambda query: jnp.sum(energy(query, g)))(g)


def slope(dynamics: Dynamics, x: States) -> Slope:
    """The energy of every token and its gradients in the token's own g and x."""
    g, to_x = jax.vjp(dynamics.norm, x)

    def total(query):
        energies = {name: energy(query, g) for name, energy in dynamics.energies.items()}
        return jnp.sum(add(map(at_least_float32, energies.values()))), energies

    in_g, energies = jax.grad(total, has_aux=True)(g)
    return Slope(energies, in_g, to_x(in_g)[0])


def held_energy(dynamics: Dynamics, context: States) -> Callable[[States], TokenEnergies]:
    """The total energy (N,) of tokens at any states x (N,D), their context held at its states."""
    g_context = dynamics.norm(context)

    def energy_at(x: States) -> TokenEnergies:
        g = dynamics.norm(x)
        return add(energy(g, g_context) for energy in dynamics.energies.values())

    return energy_at


def move(dynamics: Dynamics, x: States, in_g: States, scale: jax.Array | float = 1.0) -> States:
    """x - scale * eta dE/dg, for a gradient `in_g` of the energies in g."""
    return x - scale * apply_rate(dynamics.eta, in_g).astype(x.dtype)


def step(dynamics: Dynamics, x: States, scale: jax.Array | float = 1.0) -> States:
    """One step of every token down its energy, x - scale * eta dE/dg."""
    g = dynamics.norm(x)
    gradients = [energy_gradient(energy, g) for energy in dynamics.energies.values()]
    return move(dynamics, x, add(gradients), scale)


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
    """The whole path of T = len(scales) steps, with the energies and gradients on it.

    Args:
      dynamics: of every step.
      x: (N,D), the states before the first step.
      scales: c_t of every step.
    """

    def record(x):
        energies, in_g, in_x = slope(dynamics, x)
        return in_g, Trajectory(x, {**energies, "total": add(energies.values())}, in_x)

    def body(x, scale):
        in_g, here = record(x)
        return move(dynamics, x, in_g, scale), here

    last, path = jax.lax.scan(body, x, scales)
    end = record(last)[1]
    return jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), path, end)
