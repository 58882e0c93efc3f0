"""Energy landscapes: the plane of largest motion of a token, and its energy on that plane."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.core.block import Dynamics, start
from nrgpt_jax.core.descent import energy_in_context

MARGIN = 0.2  # of the extent of a path, on each side


class Landscape(NamedTuple):
    """The path of each of N tokens in its own plane, and its energy there.

    A point of the plane is `centre + u * directions[0] + v * directions[1]`.
    """

    path: Float[Array, "N T+1 2"]  # (u, v) of the states, projected
    axes: Float[Array, "N 2 G"]  # u and v of the grid
    energy: Float[Array, "N G G"]  # at (v, u): rows are v
    centre: Float[Array, "N D"]
    directions: Float[Array, "N 2 D"]  # orthonormal, the leading principal directions of the path
    explained: Float[Array, "N"]  # the share of the path's variance in the plane


def landscape(
    dynamics: Dynamics,
    states: Float[Array, "P N D"],
    context: Float[Array, "N D"],
    points: int = 31,
) -> Landscape:
    """Compute the total energy of every token around its path, with the context held fixed.

    With a norm that ignores the length of x, states are drawn at one length, sqrt(D): a token moves
    further and further outward, and no energy depends on that motion.

    Args:
      dynamics: dynamics of one sequence, with its energies and norm.
      states: (P,N,D) the paths.
      context: (N,D) states x of all tokens at which each token's context is held.
      points: G, the number of grid points in each direction.
    """
    lengths = jnp.linalg.norm(states, axis=-1, keepdims=True) / math.sqrt(states.shape[-1])
    norm = dynamics.norm.function
    ignored = jnp.allclose(norm(2.0 * states), norm(states), rtol=1e-2, atol=1e-2)
    path = jnp.swapaxes(jnp.where(ignored, states / lengths, states), 0, 1)
    centre = jnp.mean(path, axis=1)
    _, sizes, directions = jnp.linalg.svd(path - centre[:, None], full_matrices=False)
    directions = directions[:, :2]
    projected = jnp.einsum("ntd,nkd->ntk", path - centre[:, None], directions)
    low, high = projected.min(axis=1), projected.max(axis=1)
    middle, half = (low + high) / 2, (0.5 + MARGIN) * jnp.max(high - low, axis=1)
    steps = jnp.linspace(-1.0, 1.0, points)
    axes = middle[:, :, None] + half[:, None, None] * steps[None, None]
    energy_at = energy_in_context(dynamics, start(dynamics)._replace(x=context[None]))

    def at_place(place):  # all tokens at once, each at the same place of its own grid
        uv = jnp.stack([axes[:, 0, place[1]], axes[:, 1, place[0]]], axis=1)
        return energy_at((centre + jnp.einsum("nk,nkd->nd", uv, directions))[None])[0]

    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(points)] * 2, indexing="ij"), axis=-1)
    energy = jax.lax.map(at_place, grid.reshape(-1, 2)).T.reshape(-1, points, points)
    explained = jnp.sum(sizes[:, :2] ** 2, axis=1) / jnp.sum(sizes**2, axis=1)
    return Landscape(projected, axes, energy, centre, directions, explained)
