"""Does the energy fall? What the paper promises, and what a trajectory shows.

With the context of token A held fixed, a small step changes its energy at the rate

    dE_A/dt = -(dE_A/dx_A) . eta (dE_A/dg_A)

Proposition 2.1 makes that non-positive for eta = c diag(gamma), c > 0, behind a norm with gain
gamma: the Jacobian of the norm is diag(gamma) times the Hessian of a convex Lagrangian.
Proposition 2.2 does so without a norm, where the symmetric part of eta is positive semi-definite.
Behind a norm the rules `projected` and `sphere` do so for the same rates (`core.rules`).
All need a token that is not in its own context, the strict mask: otherwise its energy also
changes as a key of its own, which the gradient does not see. Any energy of a token and its
context may be meant, rotated scores, recalled inputs, leaks and mixtures too, whose gradients are
exact; not so gates that they leave out (FFG), moves that go on (momentum), nor distinct blocks,
each with an energy of its own.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.core.dynamics import Trajectory
from nrgpt_jax.core.norms import NORMS, identity
from nrgpt_jax.core.step import Dynamics, held_energy, start

ROUNDING = 64.0  # a change of energy within so many units in the last place is none
RELATIVE_ERROR = 1e-5  # of float32 parameters, when proportionality or positivity is asked
SCALES = tuple(2.0 ** (k / 4) for k in range(-48, 25))  # 2^-12 to 64, times a model's own step


class Guarantee(NamedTuple):
    """Which proposition promises that energy falls, or None, and why."""

    proposition: str | None
    reason: str


def guarantee(
    norm: str,
    gain: np.ndarray,
    eta: np.ndarray,
    *,
    strict: bool,
    rule: str = "descent",
    blocks: int = 1,
    exact: bool = True,
) -> Guarantee:
    """What the propositions say about a norm, its gain, an inference rate and a rule.

    Args:
      norm: a name of `NORMS`.
      gain: (D,), ones for a norm without gain.
      eta: the rate: (), (D,) or (D,D).
      strict: whether tokens are outside their own context.
      rule: a name of `RULES`.
      blocks: distinct blocks.
      exact: whether all energies are, `core.energies.Energy.exact`.
    """
    if not strict:
        return Guarantee(None, "the mask is inclusive: a token moves as a key of its own too")
    if not exact:
        return Guarantee(None, "the gradient of an energy leaves out how its gate changes")
    if blocks > 1:
        return Guarantee(None, f"{blocks} blocks take turns, each with an energy of its own")
    if rule in ("projected", "sphere") or (rule == "descent" and NORMS[norm].function is identity):
        return _of_positive(norm, eta, len(gain), projected=rule != "descent")
    if rule != "descent":
        return Guarantee(None, f"rule {rule}: a move does not follow the gradient of its step")
    c = _proportion(np.asarray(eta), np.asarray(gain))
    if c is not None and c > 0:
        return Guarantee("2.1", f"norm {norm} and eta = c diag(gamma) with c = {c:.3g} > 0")
    return Guarantee(None, f"norm {norm}, but eta is not c diag(gamma) with c > 0")


def _of_positive(norm: str, eta: np.ndarray, width: int, *, projected: bool) -> Guarantee:
    """Without a norm, or behind one whose projection the gradient goes through first."""
    where = f"norm {norm} and a projected gradient" if projected else "no norm"
    least = float(symmetric_spectrum(eta, width)[0])
    if least >= -RELATIVE_ERROR * float(np.abs(eta).max()):
        name = "2.2 (projected)" if projected else "2.2"
        return Guarantee(name, f"{where}, and the symmetric part of eta is positive semi-definite")
    return Guarantee(None, f"{where}, but the symmetric part of eta has the eigenvalue {least:.3g}")


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
    """What a trajectory of T steps does to the energy of each of N tokens of B sequences."""

    slopes: Float[Array, "T B N"]  # dE_A/dt at the beginning of a step, context held fixed
    uphill: Bool[Array, "T B N"]  # whether that is positive, beyond rounding
    changes: Float[Array, "T B N"]  # of the energy in a step, context held fixed
    rises: Bool[Array, "T B N"]  # whether that change is positive, beyond rounding
    largest_scales: Float[Array, "T B N"]  # see `evidence`
    context_at_rest: Bool[Array, "T B N"]  # whether no token of its context moved in a step
    rises_at_rest: Bool[Array, "T B N"]  # whether the energy rose in a step where that was so


def evidence(
    dynamics_at: Callable[[Any], Dynamics],
    inputs: Any,
    path: Trajectory,
    *,
    tolerance: float = 1e-2,
) -> Evidence:
    """Measures descent at every step of a trajectory.

    `largest_scales` are how many times longer than the model's own each step of each token could
    be for the energy to fall there and for all shorter steps that were tried (`SCALES`); 0 where
    it does not even fall at the shortest, infinity where it falls at all of them.

    Args:
      dynamics_at, inputs: of the steps, as for `dynamics.trajectory`.
      path: their trajectory.
      tolerance: a context is at rest in a step that changes no g in it by more, relative. What
        little it still moves changes energies as well, so rises are those by a token's own step.
    """

    def at_step(step):
        inputs_t, (x, energies, _, move) = step
        dynamics = dynamics_at(inputs_t)
        held = held_energy(dynamics, start(dynamics)._replace(x=x))
        in_x = jax.grad(lambda x: jnp.sum(held(x)))(x)  # of gates too, unlike the path's
        slopes = jnp.sum(in_x * move, axis=-1)
        steepest = jnp.linalg.norm(in_x, axis=-1) * jnp.linalg.norm(move, axis=-1)
        uphill = slopes > ROUNDING * jnp.finfo(x.dtype).eps * steepest
        terms = [jnp.abs(e) for name, e in energies.items() if name != "total"]
        size = jnp.sum(jnp.stack(terms), axis=0)
        resolution = ROUNDING * jnp.finfo(x.dtype).eps * size
        multiples = jnp.asarray(SCALES, x.dtype)
        after = jax.lax.map(lambda multiple: held(x + multiple * move), multiples)
        changes = after - energies["total"][None]
        rises = ~(changes <= resolution[None])  # what is not a number has not fallen
        descending = jnp.sum(jnp.cumsum(rises, axis=0) == 0, axis=0)  # from the least scale on
        bounds = jnp.concatenate([jnp.zeros(1), multiples[:-1], jnp.full(1, jnp.inf)])
        own = SCALES.index(1.0)
        g = dynamics.norm.function(x), dynamics.norm.function(x + move)
        speed = relative_speeds(jnp.stack(g))[0]
        return slopes, uphill, changes[own], rises[own], bounds[descending], speed

    steps = jax.tree.map(lambda leaf: leaf[:-1], path)
    *measured, speeds = jax.lax.map(at_step, (inputs, steps))
    strict = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs)).places.strict
    at_rest = context_at_rest(speeds, tolerance, strict=strict)
    slopes, uphill, changes, rises, largest = measured
    return Evidence(slopes, uphill, changes, rises, largest, at_rest, at_rest & rises)


def relative_speeds(g: Float[Array, "P B N D"]) -> Float[Array, "T B N"]:
    """How far a step moves each token, relative: ||g(t+1) - g(t)|| / ||g(t)||.

    Behind a norm that ignores the length of x a token comes to rest in g = norm(x), which is all
    that energies see, while x may go on in its own direction for ever.
    """
    moved = jnp.linalg.norm(g[1:] - g[:-1], axis=-1)
    return moved / jnp.maximum(jnp.linalg.norm(g[:-1], axis=-1), jnp.finfo(g.dtype).tiny)


def context_at_rest(
    speeds: Float[Array, "T B N"], tolerance: float, *, strict: bool
) -> Bool[Array, "T B N"]:
    """Whether no token of a token's context was faster than `tolerance` in a step.

    An empty context is at rest. Slow is not yet converged: as x grows, steps of the same length
    turn it less and less.
    """
    at_rest = jax.lax.cumprod((speeds <= tolerance).astype(jnp.int32), axis=2) == 1
    if strict:
        at_rest = jnp.pad(at_rest[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
    return at_rest


def settling_steps(speeds: Float[Array, "T B N"], tolerance: float) -> Int[Array, "B N"]:
    """The step from which on a token is no faster; T where it has not come to rest."""
    still = (speeds <= tolerance).astype(jnp.int32)
    return len(still) - jnp.sum(jnp.cumprod(still[::-1], axis=0), axis=0)
