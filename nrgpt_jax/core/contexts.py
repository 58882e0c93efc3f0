"""What a token's energy may read besides the token itself, and where tokens stand."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import BatchStates, PerSequence


class Context(NamedTuple):
    """Of one token; K tokens are there to be looked at, some of them in its context."""

    memory: Any  # an array (K,...): what the energy keeps of each token; None if nothing
    mask: Bool[Array, "K"]  # which of them are in the token's context
    position: Int[Array, ""]  # of the token in its sequence
    x: Float[Array, "D"]  # the token's state, before the norm
    first: Float[Array, "D"]  # its state before the first step
    lagrangian: Float[Array, ""]  # L(x) of the norm: grad L(x) = g where the norm has no gain
    g: Float[Array, "D"]  # the token's g as it stands: an energy is not differentiated in it


class CausalMask(NamedTuple):
    """Where the N tokens of each of B sequences stand, and which tokens they see.

    Without `at` they are the first N, and K = N. With `at`, N = 1: one token a sequence at a
    position of its own, and K is the number of slots of a cache.
    """

    strict: bool  # the context of A is B < A (the paper's sum), else B <= A (the release's)
    at: PerSequence | None = None

    def positions(self, count: int) -> Int[Array, "#B N"]:
        """Of the tokens themselves, (1,N) where they are the same in every sequence."""
        return jnp.arange(count)[None] if self.at is None else jnp.asarray(self.at)[:, None]

    def mask(self, count: int, seen: int) -> Bool[Array, "#B N K"]:
        """Which of `seen` tokens each token has in its context."""
        query = self.positions(count)[:, :, None]
        other = jnp.arange(seen)[None, None]
        return other < query if self.strict else other <= query


class BatchContext(NamedTuple):
    """What the contexts of all N tokens of B sequences are made of."""

    memory: Any  # (B,K,...) or None
    causal_mask: CausalMask
    x: BatchStates
    first: BatchStates
    lagrangian: Float[Array, "B N"]
    g: BatchStates

    def contexts(self) -> Context:
        """A `Context` of arrays with (B,N) in front of each, but for `memory` (B,K,...)."""
        batch, count = self.x.shape[:2]
        seen = count if self.memory is None else self.memory.shape[1]
        mask = jnp.broadcast_to(self.causal_mask.mask(count, seen), (batch, count, seen))
        positions = jnp.broadcast_to(self.causal_mask.positions(count), (batch, count))
        own = self.x, self.first, self.lagrangian, self.g
        return Context(self.memory, mask, positions, *own)


OVER_TOKENS = Context(None, *[0] * 6)  # type: ignore[arg-type]
OVER_SEQUENCES = Context(0, *[0] * 6)  # type: ignore[arg-type]
"""The axes over which `jax.vmap` takes `BatchContext.contexts()`."""
