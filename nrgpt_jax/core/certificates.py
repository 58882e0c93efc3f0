"""Does the energy fall? What the paper promises, and what a trajectory shows.

With the context of token A held fixed, a small step changes its energy at the rate

    dE_A/dt = -(dE_A/dx_A) . eta (dE_A/dg_A)

Proposition 2.1 makes that non-positive for eta = c diag(gamma), c > 0, behind a norm with gain
gamma: the Jacobian of the norm is diag(gamma) times the Hessian of a convex Lagrangian.
Proposition 2.2 does so without a norm, where the symmetric part of eta is positive semi-definite.
Both need a token that is not in its own context, the strict mask: otherwise its energy also
changes as a key of its own, which the gradient does not see.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import States
from nrgpt_jax.core.dynamics import Dynamics, Trajectory, add, held_energy, slope
from nrgpt_jax.core.norms import NORMS, identity
from nrgpt_jax.core.rates import apply_rate

ROUNDING = 64.0  # a change of energy within so many units in the last place is none
RELATIVE_ERROR = 1e-5  # of float32 parameters, when proportionality or positivity is asked
SCALES = tuple(2.0 ** (k / 4) for k in range(-48, 25))  # 2^-12 to 64, times a model's own step


class Guarantee(NamedTuple):
    """Which proposition promises that energy falls, or None, and why."""

    proposition: str | None
    reason: str


def guarantee(norm: str, gain: np.ndarray, eta: np.ndarray, *, strict: bool) -> Guarantee:
    """What the propositions say about a norm, its gain, and an inference rate.

    Args:
      norm: a name of `NORMS`.
      gain: (D,), ones for a norm without gain.
      eta: the rate: (), (D,) or (D,D).
      strict: whether tokens are outside their own context.
    """
    if not strict:
        return Guarantee(None, "the mask is inclusive: a token moves as a key of its own too")
    if NORMS[norm].function is identity:
        least = float(symmetric_spectrum(eta, len(gain))[0])
        if least >= -RELATIVE_ERROR * float(np.abs(eta).max()):
            reason = "no norm, and the symmetric part of eta is positive semi-definite"
            return Guarantee("2.2", reason)
        reason = f"no norm, but the symmetric part of eta has the eigenvalue {least:.3g}"
        return Guarantee(None, reason)
    c = _proportion(np.asarray(eta), np.asarray(gain))
    if c is not None and c > 0:
        return Guarantee("2.1", f"norm {norm} and eta = c diag(gamma) with c = {c:.3g} > 0")
    return Guarantee(None, f"norm {norm}, but eta is not c diag(gamma) with c > 0")


def symmetric_spectrum(eta: np.ndarray, width: int) -> np.ndarray:
    """The eigenvalues (D,) of (eta + eta^T) / 2, ascending."""
    matrix = _matrix(np.asarray(eta, np.float64), width)
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


def _matrix(eta: np.ndarray, width: int) -> np.ndarray:
    return eta if eta.ndim == 2 else np.diag(np.broadcast_to(eta, width))


def _proportion(eta: np.ndarray, gain: np.ndarray) -> float | None:
    """c where eta = c diag(gain), else None."""
    matrix = _matrix(eta, len(gain))
    c = float(np.diag(matrix) @ gain / (gain @ gain))
    same = np.abs(matrix - c * np.diag(gain)).max() <= RELATIVE_ERROR * np.abs(matrix).max()
    return c if same else None


class Evidence(NamedTuple):
    """What a trajectory of T steps does to the energy of each of N tokens."""

    slopes: Float[Array, "T N"]  # dE_A/dt at the beginning of a step, context held fixed
    uphill: Bool[Array, "T N"]  # whether that is positive, beyond rounding
    changes: Float[Array, "T N"]  # of the energy in a step, context held fixed
    rises: Bool[Array, "T N"]  # whether that change is positive, beyond rounding
    largest_scales: Float[Array, "T N"]  # see `evidence`
    context_at_rest: Bool[Array, "T N"]  # whether no token of its context moved in a step
    rises_at_rest: Bool[Array, "T N"]  # whether the energy rose in a step where that was so


def evidence(
    dynamics: Dynamics,
    path: Trajectory,
    step_scales: Float[Array, "T"],
    *,
    strict: bool,
    tolerance: float = 1e-2,
) -> Evidence:
    """Measures descent at every step of a trajectory.

    `largest_scales` are how many times longer than the model's own each step of each token could
    be for the energy to fall there and for all shorter steps that were tried (`SCALES`); 0 where
    it does not even fall at the shortest, infinity where it falls at all of them.

    Args:
      dynamics: of the steps.
      path: their trajectory.
      step_scales: c_t of every step.
      strict: whether tokens are outside their own context.
      tolerance: a context is at rest in a step that changes no g in it by more, relative. What
        little it still moves changes energies as well, so rises are those by a token's own step.
    """

    def at_step(x_and_scale):
        x, scale = x_and_scale
        energies, in_g, in_x = slope(dynamics, x)
        velocity = scale * apply_rate(dynamics.eta, in_g).astype(x.dtype)  # of the way back
        slopes = -jnp.sum(in_x * velocity, axis=-1)
        steepest = jnp.linalg.norm(in_x, axis=-1) * jnp.linalg.norm(velocity, axis=-1)
        uphill = slopes > ROUNDING * jnp.finfo(x.dtype).eps * steepest
        size = add(jnp.abs(e) for e in energies.values())
        resolution = ROUNDING * jnp.finfo(size.dtype).eps * size
        multiples = jnp.asarray(SCALES, x.dtype)
        held = held_energy(dynamics, x)
        after = jax.lax.map(lambda multiple: held(x - multiple * velocity), multiples)
        changes = after - add(energies.values())[None]
        rises = ~(changes <= resolution[None])  # what is not a number has not fallen
        descending = jnp.sum(jnp.cumsum(rises, axis=0) == 0, axis=0)  # from the least scale on
        bounds = jnp.concatenate([jnp.zeros(1), multiples[:-1], jnp.full(1, jnp.inf)])
        own = SCALES.index(1.0)
        return slopes, uphill, changes[own], rises[own], bounds[descending]

    measured = jax.lax.map(at_step, (path.states[:-1], step_scales))
    slopes, uphill, changes, rises, largest = measured
    speeds = relative_speeds(jax.vmap(dynamics.norm)(path.states))
    at_rest = context_at_rest(speeds, tolerance, strict=strict)
    return Evidence(slopes, uphill, changes, rises, largest, at_rest, at_rest & rises)


def relative_speeds(g: Float[Array, "T+1 N D"]) -> Float[Array, "T N"]:
    """How far a step moves each token, relative: ||g(t+1) - g(t)|| / ||g(t)||.

    Behind a norm that ignores the length of x a token comes to rest in g = norm(x), which is all
    that energies see, while x may go on in its own direction for ever.
    """
    moved = jnp.linalg.norm(g[1:] - g[:-1], axis=-1)
    return moved / jnp.maximum(jnp.linalg.norm(g[:-1], axis=-1), jnp.finfo(g.dtype).tiny)


def context_at_rest(
    speeds: Float[Array, "T N"], tolerance: float, *, strict: bool
) -> Bool[Array, "T N"]:
    """Whether no token of a token's context was faster than `tolerance` in a step.

    An empty context is at rest. Slow is not yet converged: as x grows, steps of the same length
    turn it less and less.
    """
    at_rest = jax.lax.cumprod((speeds <= tolerance).astype(jnp.int32), axis=1) == 1
    if strict:
        at_rest = jnp.pad(at_rest[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return at_rest


def settling_steps(speeds: Float[Array, "T N"], tolerance: float) -> Int[Array, "N"]:
    """The step from which on a token is no faster; T where it has not come to rest."""
    still = (speeds <= tolerance).astype(jnp.int32)
    return len(still) - jnp.sum(jnp.cumprod(still[::-1], axis=0), axis=0)
