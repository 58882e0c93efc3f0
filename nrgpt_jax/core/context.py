"""The context of a token: inputs of its energy besides its own g and the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax import ops


class Context(NamedTuple):
    """The context of one token, or with leading (B,N) of the N tokens of B sequences.

    Of the K tokens that have keys, `mask` selects those in the context.
    """

    keys: Any  # arrays (K,...) or (B,K,...): the energy's keys of the K tokens; None if it has none
    strict: bool  # whether a token is excluded from its own context
    position: Int[Array, "*B"]  # of the token in its sequence
    x: Float[Array, "*B D"]  # the token's state, before the norm
    first: Float[Array, "*B D"]  # its state before the first step
    lagrangian: Float[Array, "*B"]  # L(x) of the norm: grad L(x) = g if the norm has no gain
    g: Float[Array, "*B D"]  # the token's g, held fixed: the gradient omits it
    aligned: bool = False  # whether the N tokens are the K tokens, in order
    dropout: Float[Array, "B H N K"] | None = None  # mask of the attention weights

    @property
    def mask(self) -> Bool[Array, "*B K"]:
        """Whether each of the K tokens is in the context. Raises ValueError without keys."""
        if self.keys is None:
            raise ValueError(
                "an energy that reads context.mask keeps a key of each token: give key="
            )
        num_keys = jax.tree.leaves(self.keys)[0].shape[max(self.position.ndim - 1, 0)]
        return ops.causal_mask(self.position, num_keys, self.strict)


def over_tokens(function: Callable) -> Callable:
    """Vectorize a function of one token, `(params, g, position)`, over leading axes (B,N).

    The derivative rules of `ops` are disabled here and in `over_contexts`: for one token at a time
    they would store a gradient of each weight for every token.
    """
    of_batch = jax.vmap(jax.vmap(function, (None, 0, 0)), (None, 0, 0))

    def of_all(params: Any, g: Float[Array, "B N D"], position: Int[Array, "B N"]) -> Any:
        with ops.implementation("autodiff"):
            return of_batch(params, g, position)

    return of_all


def over_contexts(function: Callable) -> Callable:
    """Vectorize a function of one token, `(params, g, context)`, over leading axes (B,N).

    Keys are converted to float32 at least.
    """

    def of_all(params: Any, g: Float[Array, "B N D"], context: Context) -> Float[Array, "B N"]:
        def of_token(g, fields, keys):
            return function(params, g, Context(keys, context.strict, *fields))

        keys = jax.tree.map(_wide, context.keys)
        with ops.implementation("autodiff"):
            of_sequence = jax.vmap(of_token, (0, 0, None))
            return jax.vmap(of_sequence)(g, tuple(context[2:7]), keys)

    return of_all


def _wide(leaf: jax.Array) -> jax.Array:
    return ops.at_least_float32(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
