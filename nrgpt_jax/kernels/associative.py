"""The attention energies for all tokens at once, by the rules of `attention`.

Each energy is given by its query and its keys: E = -(1/beta) sum_h alpha_h log sum_B
exp(beta q_A . k_B). A few queries that look back at a long memory (decoding) meet it as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params, at_least_float32
from nrgpt_jax.core.contexts import BatchContext
from nrgpt_jax.core.energies import rotate
from nrgpt_jax.core.terms import DropoutMask, Kernel
from nrgpt_jax.kernels import attention

Query = Float[Array, "G N E"]
Keys = Float[Array, "G H K E"]


class Parts(NamedTuple):
    """An attention energy of one sequence, as queries and keys."""

    query: Callable[[Params, Float[Array, "N D"], Array], Query]  # of (params, g, positions)
    keys: Callable[[Params, Array], Keys]  # of (params, memory)
    few: Callable[[Params, Float[Array, "N D"], Array, Array], tuple[Query, Keys]]
    """Queries and keys of the same scores where N is small: (params, g, positions, memory)."""


def _full_rank_few(params: Params, g, positions, memory) -> tuple[Query, Keys]:
    del positions
    width = g.shape[-1]
    query_NxHD = g @ params["J"].reshape(-1, width).T  # as one product: J is not laid out anew
    query_HxNxD = jnp.swapaxes(query_NxHD.reshape(g.shape[0], -1, width), 0, 1)
    return query_HxNxD.reshape(1, -1, width), memory[None, None]


def _low_rank_keys(params: Params, memory: Array) -> Keys:
    del params
    return jnp.swapaxes(memory, 0, 1)[:, None]


def _low_rank_query(params: Params, g, positions) -> Query:
    del positions
    return jnp.einsum("hyd,nd->hny", params["W_Q"], g)


def _turned(query: Query, positions: Array) -> Query:
    """Queries of every head, rotated by their positions."""
    return jax.vmap(jax.vmap(rotate), (0, None))(query, positions)


def _of_queries(query: Callable, keys: Callable) -> Parts:
    """Of an energy whose queries differ from head to head: the same for few of them."""
    few = lambda params, g, positions, memory: (query(params, g, positions), keys(params, memory))
    return Parts(query, keys, few)


FULL_RANK = Parts(
    query=lambda params, g, positions: g[None],
    keys=lambda params, memory: jnp.einsum("hde,kd->hke", params["J"], memory)[None],
    few=_full_rank_few,
)
FULL_RANK_ROPE = _of_queries(
    lambda params, g, positions: _turned(jnp.einsum("hed,nd->hne", params["J"], g), positions),
    lambda params, memory: jnp.broadcast_to(
        memory[None, None], (params["J"].shape[0], 1, *memory.shape)
    ),
)
LOW_RANK = _of_queries(_low_rank_query, _low_rank_keys)
LOW_RANK_ROPE = _of_queries(
    lambda params, g, positions: _turned(_low_rank_query(params, g, positions), positions),
    _low_rank_keys,
)


def _positions(g: BatchStates, around: BatchContext) -> Int[Array, "B N"]:
    return jnp.broadcast_to(around.causal_mask.positions(g.shape[1]), g.shape[:2])


def kernel(parts: Parts, use_device: bool) -> Kernel:
    """The batched forms of an attention energy with these parts.

    Args:
      parts: its queries and keys.
      use_device: whether an accelerator's own kernel may be taken.
    """

    def energies(params: Params, g: BatchStates, around: BatchContext) -> BatchEnergies:
        positions, strict = _positions(g, around), around.causal_mask.strict
        beta = params["beta"].astype(g.dtype)

        def first_tokens(g, positions, memory):
            query, keys = beta * parts.query(params, g, positions), parts.keys(params, memory)
            return attention.log_sum_exp(query, keys, strict=strict, use_device=use_device)

        def one_of_many(g, positions, memory):
            query, keys = parts.few(params, g, positions, memory)
            visible = positions[0] + (0 if strict else 1)
            return attention.first_log_sum_exp(beta * query, keys, visible)

        of_sequence = first_tokens if around.causal_mask.at is None else one_of_many
        logsumexp = jax.vmap(of_sequence)(g, positions, around.memory)
        logsumexp_BxHxN = logsumexp.reshape(g.shape[0], params["alpha"].shape[0], -1)
        alpha_H = params["alpha"].astype(logsumexp.dtype)
        return -jnp.sum(alpha_H[None, :, None] * logsumexp_BxHxN, axis=1) / at_least_float32(beta)

    def dropped(
        params: Params, g: BatchStates, around: BatchContext, keep: DropoutMask
    ) -> BatchStates:
        positions, strict = _positions(g, around), around.causal_mask.strict
        beta = params["beta"].astype(g.dtype)

        def of_sequence(g, positions, memory, keep):
            query, pull = jax.vjp(lambda g: parts.query(params, g, positions), g)
            keys = parts.keys(params, memory)
            weight = jnp.broadcast_to(
                at_least_float32(params["alpha"])[:, None], (*keep.shape[:1], g.shape[0])
            ).reshape(*keys.shape[:2], -1)
            mask = keep.reshape(*keys.shape[:2], *keep.shape[1:])
            gradient = attention.attend(beta * query, keys, weight, mask, strict=strict)
            return -pull(gradient.astype(query.dtype))[0]

        return jax.vmap(of_sequence)(g, positions, around.memory, keep)

    return Kernel(energies, dropped)
