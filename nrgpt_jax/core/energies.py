"""Energies: pure scalar functions, one value a token, whose gradients drive the model.

An energy takes the query states and the context states as two arguments,

    attention      E(params, g_query (N,D), g_context (K,D), strict=..., keep=...) -> (N,)
    feed-forward   E(params, g_query (N,D)) -> (N,)

and element A of the result is the energy of token A. The model differentiates the *query*
argument only (`core.dynamics.energy_gradient`), so that a token descends its own energy and the
future does not leak into the past. In the attention energies the N queries are the last N
tokens of the K context tokens; in training N = K.

To add a feed-forward energy, write a function of a few lines, decorate it with
`@feedforward("NAME", specs)`, and train the model called `NRGPT_H_NAME`.

Source: NRGPT (arXiv 2512.16762), section 3; FF1, FF2 and FF2W are named as in its release.
"""

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


class Energy(NamedTuple):
    """An energy function and the table of the parameters it reads."""

    function: Callable[..., TokenEnergies]
    specs: Callable[[Sizes], Specs]


ATTENTION: Registry[Energy] = Registry("attention energy")
FEEDFORWARD: Registry[Energy] = Registry("feed-forward energy")


def attention(name: str, specs: Callable[[Sizes], Specs]):
    """Registers an attention energy; `specs(sizes)` is the table of its own parameters."""
    return ATTENTION.register(name, lambda function: Energy(function, specs))


def feedforward(name: str, specs: Callable[[Sizes], Specs]):
    """Registers a feed-forward energy; `specs(sizes)` is the table of its parameters."""
    return FEEDFORWARD.register(name, lambda function: Energy(function, specs))


# Attention -------------------------------------------------------------------------------------


def _associative_memory(params: Params, query, keys, **options) -> TokenEnergies:
    """-(1/beta) sum_h alpha_h log sum_B exp(beta q_A . k_hB), in at least float32."""
    logsumexp = log_sum_exp(params["beta"].astype(query.dtype) * query, keys, **options)
    logsumexp_HxN = logsumexp.reshape(-1, query.shape[1])
    alpha_H, beta = (params[name].astype(logsumexp.dtype) for name in ("alpha", "beta"))
    return -jnp.sum(alpha_H[:, None] * logsumexp_HxN, axis=0) / beta


@attention("full_rank", lambda s: {"J": matrix(s.H, s.D, s.D)})
def full_rank(
    params: Params, g_query: States, g_context: States, *, strict: bool, keep=None
) -> TokenEnergies:
    """Attention energy with one D x D matrix J_h a head: keys (and values) are J_h^T g.

    params: J (H,D,D), alpha (H,) head weights, beta () inverse temperature.
    """
    keys_HxKxD = jnp.einsum("hde,kd->hke", params["J"], g_context)
    keep = None if keep is None else keep[None]
    return _associative_memory(params, g_query[None], keys_HxKxD[None], strict=strict, keep=keep)


@attention("low_rank", lambda s: {"W_Q": matrix(s.H, s.Y, s.D), "W_K": matrix(s.H, s.Y, s.D)})
def low_rank(
    params: Params, g_query: States, g_context: States, *, strict: bool, keep=None
) -> TokenEnergies:
    """Attention energy with J_h = W_K,h^T W_Q,h: keys and values are W_K g.

    params: W_Q, W_K (H,Y,D), alpha (H,), beta ().
    """
    query_HxNxY = jnp.einsum("hyd,nd->hny", params["W_Q"], g_query)
    keys_Hx1xKxY = jnp.einsum("hyd,kd->hky", params["W_K"], g_context)[:, None]
    keep = None if keep is None else keep[:, None]
    return _associative_memory(params, query_HxNxY, keys_Hx1xKxY, strict=strict, keep=keep)


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
