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
import numpy as np
from jaxtyping import Array, Bool, Float

from nrgpt_jax.array_types import Mask, Params, States, TokenEnergies, at_least_float32
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


def causal_mask(num_queries: int, num_context: int, strict: bool) -> Mask:
    """True where query A (one of the last N of K tokens) has token B in its context.

    The context is B < A when `strict` (the sum in the paper), else B <= A (the release's text
    models, where a token's own key counts as context).
    """
    query = jnp.arange(num_context - num_queries, num_context)[:, None]
    context = jnp.arange(num_context)[None, :]
    return context < query if strict else context <= query


def _softmax_and_logsumexp(scores: Array, mask: Array) -> tuple[Array, Array]:
    """Both over the last axis and the True entries of mask; zeros where a row has none."""
    masked = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    exp = jnp.exp(masked - peak)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    safe_total = jnp.where(total == 0.0, 1.0, total)
    logsumexp = jnp.where(total == 0.0, 0.0, jnp.log(safe_total) + peak)
    return exp / safe_total, logsumexp[..., 0]


@jax.custom_jvp
def masked_logsumexp(
    scores: Float[Array, "H N K"], mask: Bool[Array, "1 N K"], keep: Array | None = None
) -> Float[Array, "H N"]:
    """log sum exp over the unmasked entries of the last axis; 0 for a row that has none.

    `keep` is attention dropout. The energy is the minimum over weights p of
    -sum(p * scores) + sum(p log p), reached at the softmax; its gradient in the scores is
    therefore -p, and dropout removes terms of that sum: the gradient becomes -(keep * p), the
    value stays. `keep` holds 0 where dropped and 1 / (1 - rate) elsewhere, or None.
    """
    del keep
    return _softmax_and_logsumexp(scores, mask)[1]


@masked_logsumexp.defjvp
def _masked_logsumexp_jvp(primals, tangents):
    scores, mask, keep = primals
    weights, logsumexp = _softmax_and_logsumexp(scores, mask)
    if keep is not None:
        weights = weights * keep
    return logsumexp, jnp.sum(weights * tangents[0], axis=-1)


def _associative_memory(params: Params, scores_HxNxK: Array, strict: bool, keep) -> TokenEnergies:
    """-(1/beta) sum_h alpha_h log sum_B exp(beta scores_hAB), in at least float32."""
    scores_HxNxK = at_least_float32(scores_HxNxK)
    alpha_H, beta = (params[name].astype(scores_HxNxK.dtype) for name in ("alpha", "beta"))
    mask_NxK = causal_mask(scores_HxNxK.shape[-2], scores_HxNxK.shape[-1], strict)
    logsumexp_HxN = masked_logsumexp(beta * scores_HxNxK, mask_NxK[None], keep)
    return -jnp.sum(alpha_H[:, None] * logsumexp_HxN, axis=0) / beta


@attention("full_rank", lambda s: {"J": matrix(s.H, s.D, s.D)})
def full_rank(
    params: Params, g_query: States, g_context: States, *, strict: bool, keep=None
) -> TokenEnergies:
    """Attention energy with one D x D matrix J_h a head: keys and values are the states g.

    params: J (H,D,D), alpha (H,) head weights, beta () inverse temperature.
    """
    query_HxNxD = jnp.einsum("hde,ne->hnd", params["J"], g_query)
    scores_HxNxK = jnp.einsum("hnd,kd->hnk", query_HxNxD, g_context)
    return _associative_memory(params, scores_HxNxK, strict, keep)


@attention("low_rank", lambda s: {"W_Q": matrix(s.H, s.Y, s.D), "W_K": matrix(s.H, s.Y, s.D)})
def low_rank(
    params: Params, g_query: States, g_context: States, *, strict: bool, keep=None
) -> TokenEnergies:
    """Attention energy with J_h = W_K,h^T W_Q,h: keys and values are W_K g.

    params: W_Q, W_K (H,Y,D), alpha (H,), beta ().
    """
    query_HxNxY = jnp.einsum("hyd,nd->hny", params["W_Q"], g_query)
    key_HxKxY = jnp.einsum("hyd,kd->hky", params["W_K"], g_context)
    scores_HxNxK = jnp.einsum("hny,hky->hnk", query_HxNxY, key_HxKxY)
    return _associative_memory(params, scores_HxNxK, strict, keep)


# Feed-forward ----------------------------------------------------------------------------------


@jax.custom_jvp
def gelu(z: Array) -> Array:
    """The exact (erf) GELU, z Phi(z); its first two derivatives share one erf and one exp."""
    return z * _normal_cdf(z)


@jax.custom_jvp
def _gelu_slope(z: Array) -> Array:
    return _normal_cdf(z) + z * _normal_pdf(z)


gelu.defjvps(lambda tangent, _, z: _gelu_slope(z) * tangent)
_gelu_slope.defjvps(lambda tangent, _, z: (2.0 - z * z) * _normal_pdf(z) * tangent)


def _normal_cdf(z: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(z * np.sqrt(0.5).astype(z.dtype)))


def _normal_pdf(z: Array) -> Array:
    return jnp.exp(-0.5 * z * z) * np.sqrt(0.5 / np.pi).astype(z.dtype)


def _affine(params: Params, layer: str, h: Array) -> Array:
    return h @ params[f"W{layer}"].T + params[f"b{layer}"][None]


@feedforward("FF1", lambda s: {"W1": matrix(s.M, s.D), "b1": vector(s.M)})
def ff1(params: Params, g_query: States) -> TokenEnergies:
    """-|| gelu(W1 g + b1) ||^2, with hidden width M."""
    return -jnp.sum(gelu(_affine(params, "1", g_query)) ** 2, axis=-1)


@feedforward(
    "FF2",
    lambda s: {
        "W1": matrix(s.D, s.D),
        "b1": vector(s.D),
        "W2": matrix(s.M, s.D),
        "b2": vector(s.M),
    },
)
def ff2(params: Params, g_query: States) -> TokenEnergies:
    """-|| gelu(W2 gelu(W1 g + b1) + b2) ||^2, with hidden widths D, then M."""
    hidden = gelu(_affine(params, "1", g_query))
    return -jnp.sum(gelu(_affine(params, "2", hidden)) ** 2, axis=-1)


@feedforward(
    "FF2W",
    lambda s: {
        "W1": matrix(s.M, s.D),
        "b1": vector(s.M),
        "W2": matrix(s.D, s.M),
        "b2": vector(s.D),
    },
)
def ff2w(params: Params, g_query: States) -> TokenEnergies:
    """-g . (W2 gelu(W1 g + b1) + b2), with hidden width M."""
    return -jnp.sum(g_query * _affine(params, "2", gelu(_affine(params, "1", g_query))), axis=-1)
