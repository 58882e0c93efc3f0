"""Functions of logits in chunks of tokens: (B,N,V) is never materialized as a whole."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.array_types import BatchStates
from nrgpt_jax.models.language_model import LanguageModel

LOGITS_AT_ONCE = 2**25  # values; 128 MiB in float32


def map_logits(
    model: LanguageModel, params: Any, x: BatchStates, function: Callable, *of_tokens: jax.Array
) -> Any:
    """Apply a function to the logits of every token, and return a tree of arrays (B,N).

    Args:
      model, params: model from `create_model`, and its parameters.
      x: (B,N,D) states after the last step.
      function: `(logits (b,n,V), then of_tokens (b,n)) -> arrays (b,n)`, independent by token.
      of_tokens: (B,N) further arguments of the function.
    """

    def of_part(part):
        x, *others = part
        return function(model.apply({"params": params}, x, method=model.readout), *others)

    arrays = (x, *of_tokens)
    if _count(model, x) <= 1:
        return of_part(arrays)
    shape = x.shape[:2]
    joined = lambda leaf: leaf.reshape(-1)[: math.prod(shape)].reshape(shape)
    return jax.tree.map(joined, jax.lax.map(of_part, _in_parts(model, arrays)))


def weighted_sum(
    model: LanguageModel,
    params: Any,
    x: BatchStates,
    weights: Float[Array, "B N"],
    function: Callable,
    *of_tokens: jax.Array,
) -> Float[Array, ""]:
    """Return the weighted sum over tokens of a function of their logits.

    Its gradient in `params` and `x` is computed together with it, chunk by chunk, so that neither
    logits nor their gradients are stored or computed twice. The other arrays have no gradient.

    Args:
      model, params, x, of_tokens: as in `map_logits`.
      weights: weight of every token.
      function: as in `map_logits`, returning one array.
    """

    def of_part(params, x, weights, *others):
        logits = model.apply({"params": params}, x, method=model.readout)
        return jnp.sum(weights * function(logits, *others))

    arrays = (x, weights, *of_tokens)
    if _count(model, x) <= 1:
        return of_part(params, *arrays)
    read = {name: params[name] for name in model.readout_groups()}
    x, *rest = _in_parts(model, arrays)
    return _sum_of_parts(of_part, read, x, params, rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_parts(of_part: Callable, read, x, params, rest) -> Float[Array, ""]:
    """Sum over chunks; only `read`, a part of the parameters, and `x` have gradients."""
    add = lambda total, part: (total + of_part({**params, **read}, *part), None)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (x, *rest))[0]


def _sum_of_parts_fwd(of_part, read, x, params, rest):
    of_read = lambda read, *part: of_part({**params, **read}, *part)

    def add(total, part):
        value, (in_read, grad_x) = jax.value_and_grad(of_read, (0, 1))(read, *part)
        return jax.tree.map(jnp.add, total, (value, in_read)), grad_x

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), jnp.float32), read))
    (total, in_read), grad_x = jax.lax.scan(add, zeros, (x, *rest))
    return total, (in_read, grad_x)


def _sum_of_parts_bwd(of_part, residuals, cotangent):
    scaled = jax.tree.map(lambda leaf: cotangent * leaf, residuals)
    return (*scaled, None, None)


_sum_of_parts.defvjp(_sum_of_parts_fwd, _sum_of_parts_bwd)


def _count(model: LanguageModel, x: jax.Array) -> int:
    return -(-x.shape[0] * x.shape[1] * model.vocab_size // LOGITS_AT_ONCE)


def _in_parts(model: LanguageModel, arrays: Any) -> Any:
    """Split arrays (B,N,...) into (parts,1,C,...), padded with zeros."""
    count = _count(model, arrays[0])

    def split(array):
        rows = array.reshape(-1, *array.shape[2:])
        length = -(-len(rows) // count)
        missing = count * length - len(rows)
        rows = jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
        return rows.reshape(count, 1, length, *array.shape[2:])

    return jax.tree.map(split, arrays)
