"""The log-sum-exp of attention with fast first and second derivatives.

An attention energy is a function of

    L_A = log sum_B exp(q_A . k_B)          B in the context of A

A step of the model needs its gradient in the query, `attend`: the softmax average of the keys. Both
derivatives are in closed form. They work on blocks of query rows, with the keys up to the last row
of the block, so nothing above the diagonal blocks is computed. The outer gradient recomputes the
N x K weights from the log-sum-exp, so training stores no array quadratic in the context length. Two
exceptions are the masks of attention dropout, and losses that depend on values of energies, as in a
mixture: the derivative of these values in the keys uses the full matrix of scores.

The rules act on one sequence: query (G,N,E) and keys (G,H,K,E), where the H heads of a group share
their queries. Full-rank attention is one group of H heads of width E = D, low-rank attention H
groups of one head of width E = Y.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.ops import flash
from nrgpt_jax.ops.dense import accumulator_type, is_autodiff, may_use_device

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256  # query rows

Query = Float[Array, "G N E"]
Keys = Float[Array, "G H K E"]
PerQuery = Float[Array, "G H N"]
DropoutMask = Float[Array, "B H N K"]
"""Dropout of attention weights: 0 where dropped, 1 / (1 - rate) elsewhere."""


def causal_mask(position: Int[Array, "*B"], num_keys: int, strict: bool) -> Bool[Array, "*B K"]:
    """Return whether each token B, 0 to K - 1, is in the context of a token at a position.

    The context is B < A if `strict` (the sum in the paper), else B <= A (the release's text models,
    where a token's own key is in its context).
    """
    at, other = position[..., None], jnp.arange(num_keys).reshape((1,) * position.ndim + (-1,))
    return other < at if strict else other <= at


def log_sum_exp(
    query: jax.Array,
    keys: jax.Array,
    position: Int[Array, "*B"],
    *,
    strict: bool,
    aligned: bool = False,
    dropout: DropoutMask | None = None,
) -> Float[Array, "*B H"]:
    """Compute log sum_B exp(q_hA . k_hB) over the context of each query; 0 if it is empty.

    Args:
      query: (B,N,H,E), or (B,N,E) shared by the heads; without (B,N) for one token.
      keys: (B,K,H,E), or (B,K,E) shared by the heads; without B for one token.
      position: (B,N) positions of the queries among the keys.
      strict: as in `causal_mask`.
      aligned: whether the queries are those of all K tokens, in order.
      dropout: mask of the weights in the gradient; the value is computed without dropout.

    Returns:
      The values in float32 at least.
    """
    if position.ndim == 0:
        of_one = query[None, None], keys[None], position[None, None]
        return log_sum_exp(*of_one, strict=strict)[0, 0]
    if not aligned or is_autodiff():
        sides = "bn{}e,bk{}e->bhnk".format("h" * (query.ndim - 3), "h" * (keys.ndim - 3))
        mask = causal_mask(position, keys.shape[1], strict)[:, None]
        scores = jnp.einsum(sides, query, keys, preferred_element_type=accumulator_type(query))
        plain = is_autodiff() and dropout is None
        value = _softmax(scores, mask)[1] if plain else _masked_log_sum_exp(scores, mask, dropout)
        return jnp.swapaxes(value, 1, 2)
    if query.ndim == 3:  # one group of heads; else one head in each
        query, keys = query[:, None], jnp.swapaxes(keys, 1, 2)[:, None]
    else:
        query = jnp.swapaxes(query, 1, 2)
        keys = jnp.swapaxes(keys if keys.ndim == 4 else keys[:, :, None], 1, 2)
        keys = jnp.broadcast_to(keys, (*query.shape[:2], *keys.shape[2:]))[:, :, None]
    if dropout is not None:
        dropout = dropout.reshape(*keys.shape[:3], *dropout.shape[2:])
    rule = partial(_log_sum_exp, strict, may_use_device())
    value = jax.vmap(rule)(query, keys, dropout)
    return jnp.swapaxes(value.reshape(value.shape[0], -1, value.shape[-1]), 1, 2)


@jax.custom_jvp
def _masked_log_sum_exp(scores: Array, mask: Array, keep: Array | None) -> Array:
    del keep
    return _softmax(scores, mask)[1]


@_masked_log_sum_exp.defjvp
def _masked_log_sum_exp_jvp(primals, tangents):
    scores, mask, keep = primals
    weights, logsumexp = _softmax(scores, mask)
    return logsumexp, jnp.sum(_times(keep, weights) * tangents[0], axis=-1)


def _softmax(scores: Array, mask: Array) -> tuple[Array, Array]:
    """Return the weights over the last axis, and the log-sum-exp; zeros if a row has no context."""
    masked = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    exp = jnp.exp(masked - peak)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    safe_total = jnp.where(total == 0.0, 1.0, total)
    logsumexp = jnp.where(total == 0.0, 0.0, jnp.log(safe_total) + peak)
    return exp / safe_total, logsumexp[..., 0]


# The rules --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_sum_exp(strict: bool, use_device: bool, query: Query, keys: Keys, keep=None) -> PerQuery:
    del use_device, keep
    parts, product = [], partial(jnp.einsum, preferred_element_type=accumulator_type(query))
    for rows, visible, at in _blocks(query.shape[1]):
        scores = product("gne,ghke->gnhk", query[:, rows], keys[:, :, :visible])
        mask = causal_mask(at, visible, strict)[None, :, None]
        parts.append(jnp.swapaxes(_softmax(scores, mask)[1], 1, 2))
    return jnp.concatenate(parts, axis=2)


def _log_sum_exp_fwd(strict, use_device, query, keys, keep):
    # Dropout applies to the gradient only, not to the value.
    return _log_sum_exp(strict, use_device, query, keys, None), (query, keys, keep)


def _log_sum_exp_bwd(strict, use_device, residuals, weight):
    query, keys, keep = residuals
    product = partial(jnp.einsum, preferred_element_type=accumulator_type(query))

    def value(keys):  # rarely needed: a step does not differentiate the context of an energy
        mask = causal_mask(jnp.arange(query.shape[1]), keys.shape[2], strict)[None, :, None]
        return _softmax(product("gne,ghke->gnhk", query, keys), mask)[1]

    of_keys = jax.vjp(value, keys)[1](jnp.swapaxes(weight, 1, 2))[0]
    of_query = attend(query, keys, weight, keep, strict=strict, use_device=use_device)
    return of_query, of_keys, None


_log_sum_exp.defvjp(_log_sum_exp_fwd, _log_sum_exp_bwd)


def attend(
    query: Query,
    keys: Keys,
    weight: PerQuery,
    keep: Float[Array, "G H N K"] | None = None,
    *,
    strict: bool,
    use_device: bool = True,
) -> Float[Array, "G N E"]:
    """Compute sum_h weight_hA sum_B p_hAB k_hB, p the softmax: the gradient of `log_sum_exp`.

    Args:
      query, keys: of one sequence, with heads in groups.
      weight: (G,H,N), the cotangent of the log-sum-exps.
      keep: dropout mask of the weights p, 0 where dropped and 1 / (1 - rate) elsewhere.
      strict: as in `causal_mask`.
      use_device: whether an accelerator kernel may be used.
    """

    def of_heads(query, keys, weight, keep):
        if keep is None and use_device:
            out = flash.attend(query, keys, weight, strict)
            if out is not None:
                return out
        return _attend(query, keys, weight, keep, strict)

    return flash.split_heads(of_heads, *keys.shape[:2])(query, keys, weight, keep)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, keys, weight, keep, strict):
    return _attend_fwd(query, keys, weight, keep, strict)[0]


def _attend_fwd(query, keys, weight, keep, strict):
    outs, logsumexps = [], []
    product = partial(jnp.einsum, preferred_element_type=accumulator_type(query))
    for rows, visible, at in _blocks(query.shape[1]):
        k = keys[:, :, :visible]
        scores = product("gne,ghke->gnhk", query[:, rows], k)
        p, logsumexp = _softmax(scores, causal_mask(at, visible, strict)[None, :, None])
        logsumexps.append(jnp.swapaxes(logsumexp, 1, 2))
        keep_rows = None if keep is None else jnp.swapaxes(keep[:, :, rows, :visible], 1, 2)
        p = jnp.swapaxes(weight[:, :, rows], 1, 2)[..., None] * _times(keep_rows, p)
        outs.append(product("gnhk,ghke->gne", p.astype(query.dtype), k))
    out = jnp.concatenate(outs, axis=1).astype(query.dtype)
    return out, (query, keys, weight, keep, jnp.concatenate(logsumexps, axis=2))


def _attend_bwd(strict, residuals, cotangent):
    query, keys, weight, keep, logsumexp = residuals
    of_query, of_weight = [], []
    product = partial(jnp.einsum, preferred_element_type=accumulator_type(query))
    groups, heads, num_keys, width = keys.shape
    of_keys = jnp.zeros((groups, width, heads, num_keys), logsumexp.dtype)  # avoids a transpose
    for rows, visible, at in _blocks(query.shape[1]):
        q, k, ct, w = query[:, rows], keys[:, :, :visible], cotangent[:, rows], weight[:, :, rows]
        keep_rows = None if keep is None else jnp.swapaxes(keep[:, :, rows, :visible], 1, 2)
        scores = product("gne,ghke->gnhk", q, k)
        excess = scores - jnp.swapaxes(logsumexp[:, :, rows], 1, 2)[..., None]
        p = jnp.exp(jnp.where(causal_mask(at, visible, strict)[None, :, None], excess, -jnp.inf))
        w = jnp.swapaxes(w, 1, 2)[..., None]
        slope = _times(keep_rows, product("gne,ghke->gnhk", ct, k))
        mean = jnp.sum(p * slope, axis=-1, keepdims=True)
        of_scores = (w * p * (slope - mean)).astype(query.dtype)
        dropped_p = (w * _times(keep_rows, p)).astype(query.dtype)
        of_query.append(product("gnhk,ghke->gne", of_scores, k))
        of_weight.append(jnp.swapaxes(mean[..., 0], 1, 2))
        of_k = product("gne,gnhk->gehk", q, of_scores) + product("gne,gnhk->gehk", ct, dropped_p)
        of_keys = of_keys.at[..., :visible].add(of_k)
    return (
        jnp.concatenate(of_query, axis=1).astype(query.dtype),
        jnp.transpose(of_keys, (0, 2, 3, 1)).astype(keys.dtype),
        jnp.concatenate(of_weight, axis=2).astype(weight.dtype),
        None,
    )


_attend.defvjp(_attend_fwd, _attend_bwd)


def _blocks(count: int) -> Iterator[tuple[slice, int, Array]]:
    """Yield ranges of query rows, the number of keys visible to the last row, and positions."""
    size = min(max(count // 8, SMALLEST_BLOCK), LARGEST_BLOCK)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), stop, jnp.arange(start, stop)


def _times(keep: Array | None, x: Array) -> Array:
    return x if keep is None else keep * x
