"""Does a token converge? Its own block of the Jacobian of a step, token by token.

Token A never sees a later one, so the Jacobian of a step of N tokens is block-triangular, and its
eigenvalues are those of its N blocks on the diagonal, each (D,D):

    J_A = d x_A(t+1) / d x_A(t),    for the rule `descent` behind a strict mask
    J_A = 1 - eta (d2E_A / dg_A^2) (dg_A / dx_A)

Under an inclusive mask a token is a key of its own, and the block holds that too: every token goes
by itself, as when it is decoded.

Behind a norm x has directions that energies do not see, its length and its mean, in which nothing
ever converges nor is disturbed (an eigenvalue of one). So convergence is asked of u = n(x), n the
norm without gain and bias: the step as a map u(t) -> u(t+1), at the length that x has. Where the
spectral radius of its block is below one at a fixed point, A returns to it from nearby once the
tokens before it have, by that factor a step in the long run; so a text is at a fixed point, and
stays there, when this holds of all its tokens. As long as x grows the factor tends to one.
Source: none that is published; of block-triangular matrices any book.
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
"""States of n tokens -> those after a step, each in a context of the others held fixed."""

MARGIN = 0.01  # below one, of a radius: power iteration has found it to about as much
AT_ONCE = 16  # tokens whose blocks are looked at together: each has a context of its own


class Attraction(NamedTuple):
    """How the tokens of B sequences return to where they are."""

    radius: Float[Array, "B N"]  # spectral radius of the block of a token, of u = n(x); nan
    # where the step depends on more of x than u and its length, as behind a norm that saturates
    speed: Float[Array, "B N"]  # ||u(t+1) - u(t)|| / ||u(t)|| of one more step

    def attracts(self, tolerance: float) -> Bool[Array | np.ndarray, "*shape"]:
        """Of each token: converged within the tolerance, and returning there from nearby."""
        return (self.speed <= tolerance) & (self.radius < 1.0 - MARGIN)


def own_step(
    dynamics: Dynamics, state: State, scale: Any = 1.0, tokens: Int[Array, "n"] | None = None
) -> OwnStep:
    """The step of every token alone, what it sees of the others held where they are in `state`.

    Each token is a sequence of one, at its position, before a cache of all: B x n x N rows.

    Args:
      dynamics, state: of B sequences.
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
    """The whole block of every token at states x: J_A[i,j] = d x_i(t+1) / d x_j(t)."""
    along = lambda direction: jax.jvp(function, (x,), (jnp.broadcast_to(direction, x.shape),))[1]
    columns = jax.lax.map(along, jnp.eye(x.shape[-1], dtype=x.dtype)[:, None, None])
    return jnp.moveaxis(columns, 0, -1)


def spectral_radii(
    function: OwnStep, x: BatchStates, key: Key, iterations: int = 64
) -> Float[Array, "B N"]:
    """The spectral radius of every token's block, by power iteration from a random vector.

    The mean growth over the second half of the iterations: a pair of complex eigenvalues makes
    the growth swing about it. In exact arithmetic it tends to the radius, slowly for eigenvalues
    that lie close together.
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
    """How tokens return to where energies see them in `state`, some of them at a time.

    Args:
      dynamics: of a step; all further steps are like it.
      state: where tokens are, after many steps.
      key: of the first vectors of the power iteration.
      scale: c_t of the step.
      iterations: of the power iteration.
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
