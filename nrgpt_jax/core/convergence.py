"""Convergence of single tokens, by the spectral radius of their blocks of a step's Jacobian.

Token A never sees a later token, so the Jacobian of a step of N tokens is block-triangular. Its
eigenvalues are those of its N diagonal blocks, each (D,D):

    J_A = d x_A(t+1) / d x_A(t),    for the rule `descent` with a strict mask
    J_A = 1 - eta (d2E_A / dg_A^2) (dg_A / dx_A)

Under an inclusive mask a token is one of its own keys, and the block includes this dependence: each
token moves alone, as in decoding.

With a norm, energies do not depend on the length and the mean of x: along these directions a
perturbation neither decays nor grows (an eigenvalue of one). Convergence is therefore that of
u = n(x), n the norm without gain and bias: the step is a map u(t) -> u(t+1) at the current length
of x. If the spectral radius of A's block is below one at a fixed point, A returns to it from nearby
once the tokens before it have, asymptotically by that factor per step. A text is at a stable fixed
point if this holds for all its tokens. While x grows, the factor tends to one.
Source: none published; for block-triangular matrices any textbook.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchStates, Key
from nrgpt_jax.core.block import Dynamics, State, block, update_cache

OwnStep = Callable[[Float[Array, "B n D"]], Float[Array, "B n D"]]
"""A map from states of n tokens to those after a step, the other tokens of each held fixed."""

MARGIN = 0.01  # of a radius below one, about the error of power iteration
AT_ONCE = 16  # tokens processed together: each has its own copy of the context


class Attraction(NamedTuple):
    """The local convergence of the tokens of B sequences to their current states."""

    radius: Float[Array, "B N"]  # spectral radius of the block of a token, for u = n(x);
    # nan if the step depends on more of x than u and its length, as with a norm that saturates
    speed: Float[Array, "B N"]  # ||u(t+1) - u(t)|| / ||u(t)|| of one more step

    def attracts(self, tolerance: float) -> Bool[Array | np.ndarray, "*shape"]:
        """Whether each token has converged within the tolerance and returns there from nearby."""
        return (self.speed <= tolerance) & (self.radius < 1.0 - MARGIN)


def own_step(
    dynamics: Dynamics, state: State, scale: Any = 1.0, tokens: Int[Array, "n"] | None = None
) -> OwnStep:
    """Return the step of every token alone, with all other tokens held at `state`.

    Each token is a sequence of length one at its position, with a cache of all: B x n x N rows.

    Args:
      dynamics, state: dynamics and state of B sequences.
      scale: c_t of the step.
      tokens: positions of the tokens; None: all.
    """
    batch, count, width = state.x.shape
    tokens = jnp.arange(count) if tokens is None else tokens
    keys, _ = update_cache(dynamics, state, dynamics.norm.function(state.x))
    alone = lambda leaf: leaf.reshape(batch * len(tokens), 1, *leaf.shape[2:])
    chosen = lambda leaf: alone(leaf[:, tokens])
    rows = jax.tree.map(lambda key: jnp.repeat(key, len(tokens), axis=0)[None], keys)
    single = dynamics._replace(position=jnp.tile(tokens, batch), first=chosen(dynamics.first))
    rule_states = jax.tree.map(chosen, state.rule)

    def function(x: BatchStates) -> BatchStates:
        begin = State(alone(x), rule_states, rows, jnp.zeros((), jnp.int32))
        return block(single, begin, scale)[0].x.reshape(batch, len(tokens), width)

    return function


def token_jacobians(function: OwnStep, x: BatchStates) -> Float[Array, "B N D D"]:
    """Compute the full block of every token at states x: J_A[i,j] = d x_i(t+1) / d x_j(t)."""
    along = lambda direction: jax.jvp(function, (x,), (jnp.broadcast_to(direction, x.shape),))[1]
    columns = jax.lax.map(along, jnp.eye(x.shape[-1], dtype=x.dtype)[:, None, None])
    return jnp.moveaxis(columns, 0, -1)


def spectral_radii(
    function: OwnStep, x: BatchStates, key: Key, iterations: int = 64
) -> Float[Array, "B N"]:
    """Estimate the spectral radius of every token's block by power iteration from a random vector.

    The estimate is the mean growth over the second half of the iterations, since a pair of complex
    eigenvalues makes the growth oscillate. In exact arithmetic it converges to the radius, slowly
    if eigenvalues lie close together.
    """
    tiny = jnp.finfo(x.dtype).tiny
    _, push = jax.linearize(function, x)

    def iterate(v, _):
        new = push(v)
        size = jnp.linalg.norm(new, axis=-1)
        return new / jnp.maximum(size, tiny)[..., None], jnp.log(jnp.maximum(size, tiny))

    v = jax.random.normal(key, x.shape, x.dtype)
    v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    _, growth = jax.lax.scan(iterate, v, length=iterations)
    return jnp.exp(jnp.mean(growth[iterations // 2 :], axis=0))


def attraction(
    dynamics: Dynamics, state: State, key: Key, *, scale: Any = 1.0, iterations: int = 64
) -> Attraction:
    """Compute the local convergence of all tokens at `state`, `AT_ONCE` tokens at a time.

    Args:
      dynamics: dynamics of a step, assumed for all further steps.
      state: state of the tokens after many steps.
      key: PRNG key for the initial vectors of the power iteration.
      scale: c_t of the step.
      iterations: number of iterations of the power iteration.
    """
    count, unit = state.x.shape[1], dynamics.norm.unit

    def of_some(tokens: Int[Array, "n"]):
        function, x = own_step(dynamics, state, scale, tokens), state.x[:, tokens]
        length = dynamics.norm.sigma(x)[..., None]
        of_u, u = lambda u: unit(function(length * u)), unit(x)
        radii = spectral_radii(of_u, u, jax.random.fold_in(key, tokens[0]), iterations)
        size = jnp.maximum(jnp.linalg.norm(u, axis=-1), jnp.finfo(u.dtype).tiny)
        of_u_alone = jnp.linalg.norm(of_u(u) - unit(function(x)), axis=-1) <= MARGIN * size
        radii = jnp.where(of_u_alone, radii, jnp.nan)
        return Attraction(radii, jnp.linalg.norm(of_u(u) - u, axis=-1) / size)

    parts = -(-count // AT_ONCE)
    tokens = jnp.minimum(jnp.arange(parts * min(AT_ONCE, count)), count - 1)
    attractions = jax.lax.map(of_some, tokens.reshape(parts, -1))
    joined = lambda leaf: jnp.moveaxis(leaf, 1, 0).reshape(leaf.shape[1], -1)[:, :count]
    return jax.tree.map(joined, attractions)
