"""Energies: pure scalar functions, one value a token, whose gradients drive the model.

An energy takes the query states and the context states as two arguments,

    attention      E(params, g_query (N,D), memory (K,...), strict=..., keep=..., visible=...)
    feed-forward   E(params, g_query (N,D))

and element A of the result (N,) is the energy of token A. The model differentiates the *query*
argument only (`core.dynamics.energy_gradient`), so that a token descends its own energy and the
future does not leak into the past. An attention energy sees its context g (K,D) through its
`memory(params, g)`, one row a token: what a cache keeps of a token. The N queries are the last N
tokens of the K context tokens (in training N = K), or each sees the first `visible` rows.

To add a feed-forward energy, write a function of a few lines, decorate it with
`@feedforward("NAME", specs)`, and train the model called `NRGPT_H_NAME`.

Source: NRGPT (arXiv 2512.16762), section 3; FF1, FF2 and FF2W are named as in its release.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nrgpt_jax.array_types import Params, States, TokenEnergies
from nrgpt_jax.core.attention import log_sum_exp
from nrgpt_jax.core.gelu import gelu
from nrgpt_jax.core.linear import contract, expand
from nrgpt_jax.core.parameters import Sizes, Specs, matrix, vector
from nrgpt_jax.core.registry import Registry

Memory = Callable[[Params, States], jax.Array]


class FeedForward(NamedTuple):
    """An energy of single tokens and the table of the parameters it reads."""

    function: Callable[..., TokenEnergies]
    specs: Callable[[Sizes], Specs]


class Attention(NamedTuple):
    """An energy of tokens in a context, the table of its parameters, and its memory."""

    function: Callable[..., TokenEnergies]
    specs: Callable[[Sizes], Specs]
    memory: Memory

    def energy(
        self, params: Params, g_query: States, g_context: States, **options
    ) -> TokenEnergies:
        """The energy of queries (N,D) in a context of states (K,D)."""
        return self.function(params, g_query, self.memory(params, g_context), **options)


ATTENTION: Registry[Attention] = Registry("attention energy")
FEEDFORWARD: Registry[FeedForward] = Registry("feed-forward energy")


def attention(name: str, specs: Callable[[Sizes], Specs], memory: Memory = lambda params, g: g):
    """Registers an attention energy; it takes `strict`, `keep` and `visible` by name.

    Args:
      name: of the choice `model.attention`.
      specs: the table of its own parameters, by the sizes of a model.
      memory: what it reads of its context, (K,...) from states (K,D), row by row; by default
        the states themselves.
    """

    def entry(function: Callable[..., TokenEnergies]) -> Attention:
        missing = {"strict", "keep", "visible"} - set(inspect.signature(function).parameters)
        if missing:
            raise TypeError(f"attention energy {name!r} does not take {', '.join(sorted(missing))}")
        return Attention(function, specs, memory)

    return ATTENTION.register(name, entry)


def feedforward(name: str, specs: Callable[[Sizes], Specs]):
    """Registers a feed-forward energy; `specs(sizes)` is the table of its parameters."""
    return FEEDFORWARD.register(name, lambda function: FeedForward(function, specs))


# Attention -------------------------------------------------------------------------------------


def _associative_memory(params: Params, query, keys, **options) -> TokenEnergies:
    """-(1/beta) sum_h alpha_h log sum_B exp(beta q_A . k_hB), in at least float32."""
    logsumexp = log_sum_exp(params["beta"].astype(query.dtype) * query, keys, **options)
    alpha_H, beta = (params[name].astype(logsumexp.dtype) for name in ("alpha", "beta"))
    logsumexp_HxN = logsumexp.reshape(len(alpha_H), -1)
    return -jnp.sum(alpha_H[:, None] * logsumexp_HxN, axis=0) / beta


@attention("full_rank", lambda s: {"J": matrix(s.H, s.D, s.D)})
def full_rank(
    params: Params, g_query: States, memory: States, *, strict: bool, keep=None, visible=None
) -> TokenEnergies:
    """Attention energy with one D x D matrix J_h a head: keys (and values) are J_h^T g.

    params: J (H,D,D), alpha (H,) head weights, beta () inverse temperature; memory: g (K,D).
    """
    options = {"strict": strict, "keep": None if keep is None else keep[None], "visible": visible}
    if visible is None:
        keys_HxKxD = jnp.einsum("hde,kd->hke", params["J"], memory)
        return _associative_memory(params, g_query[None], keys_HxKxD[None], **options)
    # Few queries and a long memory: J_h g_A of all heads meet the memory as it is.
    query_HxNxD = jnp.einsum("hde,ne->hnd", params["J"], g_query)
    query = query_HxNxD.reshape(1, -1, query_HxNxD.shape[-1])
    return _associative_memory(params, query, memory[None, None], **options)


@attention(
    "low_rank",
    lambda s: {"W_Q": matrix(s.H, s.Y, s.D), "W_K": matrix(s.H, s.Y, s.D)},
    memory=lambda params, g: jnp.einsum("hyd,kd->khy", params["W_K"], g),
)
def low_rank(
    params: Params, g_query: States, memory: jax.Array, *, strict: bool, keep=None, visible=None
) -> TokenEnergies:
    """Attention energy with J_h = W_K,h^T W_Q,h: keys and values are W_K g.

    params: W_Q, W_K (H,Y,D), alpha (H,), beta (); memory: W_K g (K,H,Y).
    """
    query_HxNxY = jnp.einsum("hyd,nd->hny", params["W_Q"], g_query)
    keys_Hx1xKxY = jnp.swapaxes(memory, 0, 1)[:, None]
    options = {"keep": None if keep is None else keep[:, None], "visible": visible}
    return _associative_memory(params, query_HxNxY, keys_Hx1xKxY, strict=strict, **options)


# Feed-forward ----------------------------------------------------------------------------------


def _affine(h: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return expand(h, weight) + bias[None]


@feedforward("FF1", lambda s: {"W1": matrix(s.D, s.M), "b1": vector(s.M)})
def ff1(params: Params, g_query: States) -> TokenEnergies:
    """-|| gelu(g W1 + b1) ||^2, with hidden width M; W1 (D,M)."""
    return -jnp.sum(gelu(_affine(g_query, params["W1"], params["b1"])) ** 2, axis=-1)


@feedforward(
    "FF2",
    lambda s: {
        "W1": matrix(s.D, s.D),
        "b1": vector(s.D),
        "W2": matrix(s.D, s.M),
        "b2": vector(s.M),
    },
)
def ff2(params: Params, g_query: States) -> TokenEnergies:
    """-|| gelu(gelu(g W1 + b1) W2 + b2) ||^2, with hidden widths D, then M; W1 (D,D), W2 (D,M)."""
    hidden = gelu(_affine(g_query, params["W1"], params["b1"]))
    return -jnp.sum(gelu(_affine(hidden, params["W2"], params["b2"])) ** 2, axis=-1)


@feedforward(
    "FF2W",
    lambda s: {
        "W1": matrix(s.D, s.M),
        "b1": vector(s.M),
        "W2": matrix(s.D, s.M),
        "b2": vector(s.D),
    },
)
def ff2w(params: Params, g_query: States) -> TokenEnergies:
    """-g . (W2 gelu(g W1 + b1) + b2), with hidden width M; W1 and W2 (D,M)."""
    hidden = gelu(_affine(g_query, params["W1"], params["b1"]))
    return -jnp.sum(g_query * (contract(hidden, params["W2"]) + params["b2"][None]), axis=-1)
