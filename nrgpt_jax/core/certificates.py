"""The guarantee of descent: models for which a token's energy provably decreases.

With the context of token A held fixed, a small step changes its energy at the rate

    dE_A/dt = -(dE_A/dx_A) . eta (dE_A/dg_A)

Proposition 2.1 makes this rate non-positive for eta = c diag(gamma), c > 0, with a norm of gain
gamma: the Jacobian of the norm is diag(gamma) times the Hessian of a convex Lagrangian. Proposition
2.2 does so without a norm, if the symmetric part of eta is positive semi-definite. With a norm, the
rules `projected` and `sphere` do so for the same rates (`core.rules`). All need the strict mask,
which excludes a token from its own context: otherwise its energy also changes through its own key,
which the gradient omits. They also need one energy for all steps (not several blocks) and a move
along the gradient of its step (not momentum). The gradient has to be the whole change of the energy
(that of FFG omits its gate).
A line search (`core.block.line_search`) needs neither the rate nor the rule: it compares energies.

A guarantee rests on the declarations of a model's parts (`Norm.convex`, `Rule.follows`,
`Energy.exact`, `Combination.exact`), on the values of its rate, and on a numerical check of the
declarations at random states (`check`). Parts that declare nothing have no guarantee. The check
cannot cover every state: `core.evidence` measures descent along a trajectory.
Source: NRGPT (arXiv 2512.16762), section 2.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from nrgpt_jax.array_types import BatchEnergies, BatchStates, Key
from nrgpt_jax.core.block import (
    COMBINATIONS,
    Dynamics,
    EnergyAndGrad,
    energy_and_grad,
    start,
    update_cache,
)
from nrgpt_jax.core.convergence import token_jacobians
from nrgpt_jax.core.descent import grad_x
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.evidence import half_changes, resting
from nrgpt_jax.core.norms import NORMS, identity
from nrgpt_jax.core.rules import RULES

RELATIVE_ERROR = 1e-5  # of float32 parameters, in tests of proportionality and positivity
CHECKED = 1e-5  # relative tolerance of the numerical check, in float64
LINE_SEARCH = "line search"  # as a name beside those of the propositions
DIRECTIONS = 4  # number of random directions in which a check moves states


class Guarantee(NamedTuple):
    """The proposition that guarantees descent, or None, and the reason."""

    proposition: str | None
    reason: str


class Parts(NamedTuple):
    """The names of a model's parts, and the values of its rate."""

    norm: str
    gain: np.ndarray  # (D,), ones for a norm without gain
    eta: np.ndarray  # the rate: (), (D,) or (D,D)
    energies: Mapping[str, str]  # names by term
    combination: str = "sum"
    rule: str = "descent"
    strict: bool = True  # whether tokens are excluded from their own context
    blocks: int = 1  # number of distinct blocks
    line_search: int = 0  # number of halvings


def guarantee(parts: Parts) -> Guarantee:
    """Return the guarantee of the propositions, assuming that the declarations are true."""
    if not parts.strict:
        return Guarantee(None, "the mask is inclusive: a token moves as a key of its own too")
    if parts.blocks > 1:
        return Guarantee(None, f"{parts.blocks} blocks take turns, each with an energy of its own")
    for name in parts.energies.values():
        if not ENERGIES[name].exact:
            return Guarantee(None, f"the gradient of {name} is not known to be all of its change")
    if not COMBINATIONS[parts.combination].exact:
        why = "is not known to be differentiated whole"
        return Guarantee(None, f"combination {parts.combination} {why}")
    if parts.line_search:
        why = "a step after which a token's energy would be higher is shortened or left out"
        return Guarantee(LINE_SEARCH, why)
    follows = RULES[parts.rule].follows
    if not follows:
        why = "a move is not known to follow the gradient of its step"
        return Guarantee(None, f"rule {parts.rule}: {why}")
    if follows == "dE/dx" or NORMS[parts.norm].function is identity:
        return _of_positive(parts, projected=follows == "dE/dx")
    if not NORMS[parts.norm].convex:
        why = "is not known to be its gain times the gradient of a convex function"
        return Guarantee(None, f"norm {parts.norm} {why}")
    c = _proportion(np.asarray(parts.eta), np.asarray(parts.gain))
    if c is not None and c > 0:
        return Guarantee("2.1", f"norm {parts.norm} and eta = c diag(gamma) with c = {c:.3g} > 0")
    return Guarantee(None, f"norm {parts.norm}, but eta is not c diag(gamma) with c > 0")


def _of_positive(parts: Parts, *, projected: bool) -> Guarantee:
    """Apply Proposition 2.2: no norm, or a rule with the gradient in x (`follows` is dE/dx)."""
    where = f"norm {parts.norm} and a projected gradient" if projected else "no norm"
    smallest = float(symmetric_spectrum(parts.eta, len(parts.gain))[0])
    if smallest >= -RELATIVE_ERROR * float(np.abs(parts.eta).max()):
        name = "2.2 (projected)" if projected else "2.2"
        return Guarantee(name, f"{where}, and the symmetric part of eta is positive semi-definite")
    return Guarantee(
        None, f"{where}, but the symmetric part of eta has the eigenvalue {smallest:.3g}"
    )


def symmetric_spectrum(eta: np.ndarray, width: int) -> np.ndarray:
    """The eigenvalues (D,) of (eta + eta^T) / 2, ascending."""
    matrix = _matrix(np.asarray(eta, np.float64), width)
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


def _matrix(eta: np.ndarray, width: int) -> np.ndarray:
    return eta if eta.ndim == 2 else np.diag(np.broadcast_to(eta, width))


def _proportion(eta: np.ndarray, gain: np.ndarray) -> float | None:
    """Return c if eta = c diag(gain), else None."""
    matrix = _matrix(eta, len(gain))
    c = float(np.diag(matrix) @ gain / (gain @ gain))
    same = np.abs(matrix - c * np.diag(gain)).max() <= RELATIVE_ERROR * np.abs(matrix).max()
    return c if same else None


# The numerical check of declarations ---------------------------------------------------------


class Checks(NamedTuple):
    """The declared properties that hold at the random states."""

    exact: Bool[Array, ""]  # the gradient gives the change of a token's energy when the token moves
    causal: Bool[Array, ""]  # a token's energy does not change when a later token moves
    falls: Bool[Array, ""]  # moves lower energies to first order, for any gradient


def certify(parts: Parts, checked: Callable[[str | None], Checks]) -> Guarantee:
    """Return the `guarantee` of a model if the numerical check confirms its declarations.

    Args:
      parts: parts of the model.
      checked: returns `check` of the model's dynamics or, given a term, of `alone` with it.
    """
    promise = guarantee(parts)
    if promise.proposition is None:
        return promise
    checks = checked(None)
    falls = checks.falls or promise.proposition == LINE_SEARCH
    if checks.exact and checks.causal and falls:
        return promise
    if not falls:
        where = f"norm {parts.norm}, rule {parts.rule} and this rate"
        why = "are not known to lower energies: at drawn states their moves do not"
        return Guarantee(None, f"{where} {why}")
    bad = [name for term, name in parts.energies.items() if not all(checked(term)[:2])]
    what = f"the gradient of {bad[0]}" if bad else f"the gradient of {parts.combination}"
    why = "is not" if checks.causal else "leaves out later tokens, which it reads: it is not"
    return Guarantee(None, f"{what} {why} all of its change at drawn states")


def alone(dynamics: Dynamics, term: str) -> Dynamics:
    """Return the dynamics restricted to one term."""
    one = {term: dynamics.terms[term]}
    return dynamics._replace(terms=one, combination=COMBINATIONS["sum"], combination_params={})


def check(dynamics: Dynamics, x: BatchStates, key: Key) -> Checks:
    """Check the declarations of a model's parts numerically, in float64.

    Args:
      dynamics: dynamics of a step, with a strict mask.
      x: (B,N,D) states at which to check.
      key: PRNG key for the directions of the moves and for the gradients.
    """
    of_directions, of_gradients = jax.random.split(key)
    keys = jax.random.split(of_directions, DIRECTIONS)
    exact, causal = jax.lax.map(lambda k: _changes_as_its_gradient(dynamics, x, k), keys)
    return Checks(jnp.all(exact), jnp.all(causal), _falls(dynamics, x, of_gradients))


def _changes_as_its_gradient(dynamics: Dynamics, x: BatchStates, key: Key):
    """Check that a token's move changes its energy as its gradient says, and no earlier energy.

    All inputs of the energies are recomputed after the move.
    """
    begin = start(dynamics)

    def at(x: BatchStates) -> EnergyAndGrad:
        g = dynamics.norm.function(x)
        keys, _ = update_cache(dynamics, begin._replace(x=x), g)
        return energy_and_grad(dynamics, x, g, keys)

    gradient = grad_x(dynamics, x, at(x).grad_g)
    along = jax.random.normal(key, x.shape, x.dtype)
    count = x.shape[1]

    def of_token(token):
        moved = jnp.where((jnp.arange(count) == token)[None, :, None], along, 0.0)
        move, changes, noise = half_changes(at, x, moved)
        expected = jnp.sum(gradient * move, axis=-1)
        allowed = CHECKED * jnp.max(_lengths(gradient)) * jnp.max(_lengths(move)) + noise
        good = jnp.all(jnp.abs(changes - expected) <= allowed, axis=0)
        return good[token], jnp.all(good | (jnp.arange(count) >= token))

    exact, causal = jax.lax.map(of_token, jnp.arange(count))
    return jnp.all(exact), jnp.all(causal)


def _falls(dynamics: Dynamics, x: BatchStates, key: Key) -> Bool[Array, ""]:
    """Check that the moves A e of gradients e = dE/dg lower energies: e^T J A e <= 0, J = dg/dx.

    False for a rule with a state between steps, whose later moves may differ.
    """
    if jax.tree.leaves(dynamics.rule.init(x)):
        return jnp.zeros((), bool)
    x = x + resting(dynamics, x)  # where the rule makes no move at zero gradient
    move_of = lambda e: dynamics.rule.update(e, dynamics.rule.init(x), x)[0].astype(x.dtype)
    stays = jnp.max(jnp.abs(move_of(jnp.zeros_like(x)))) <= CHECKED * jnp.max(jnp.abs(x))
    jacobian = token_jacobians(dynamics.norm.function, x)
    slopes = jacobian @ token_jacobians(move_of, jnp.zeros_like(x))
    largest = jnp.linalg.eigvalsh((slopes + jnp.swapaxes(slopes, -1, -2)) / 2)[..., -1]
    linear = jnp.all(largest <= CHECKED * jnp.linalg.norm(slopes, axis=(-2, -1)))
    e = jax.random.normal(key, x.shape, x.dtype)
    gradient, move = grad_x(dynamics, x, e), move_of(e)
    downhill = jnp.sum(gradient * move, axis=-1) <= CHECKED * _lengths(gradient) * _lengths(move)
    return stays & linear & jnp.all(downhill)


def _lengths(x: BatchStates) -> BatchEnergies:
    return jnp.linalg.norm(x, axis=-1)
