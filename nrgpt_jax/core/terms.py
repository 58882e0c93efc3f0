"""Energies with their parameters bound, for all tokens of all sequences at once.

`plain(energy)` is the definition and `jax.grad` of it, taken over tokens and sequences by
`jax.vmap`; a `Kernel` is a faster way to the same numbers. The step knows neither apart.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrgpt_jax.array_types import BatchEnergies, BatchStates, Params, at_least_float32
from nrgpt_jax.core.combinations import Combination
from nrgpt_jax.core.contexts import OVER_SEQUENCES, OVER_TOKENS, BatchContext, Context
from nrgpt_jax.core.energies import Energy, associative_memory

DropoutMask = Float[Array, "B H N K"]
"""Dropout of attention weights: 0 where dropped, 1 / (1 - rate) elsewhere."""


class Kernel(NamedTuple):
    """Batched forms of one energy.

    `energies(params, g (B,N,D), around)` gives (B,N); only its first derivative in g, and
    that derivative's own reverse-mode derivatives, need to be there. `dropped` is its gradient
    with dropout on attention weights, for attention energies.
    """

    energies: Callable[[Params, BatchStates, BatchContext], BatchEnergies]
    dropped: Callable[[Params, BatchStates, BatchContext, DropoutMask], BatchStates] | None = None


class Term(NamedTuple):
    """One energy of a model, with its parameters, ready for a step."""

    memory: Callable[[BatchStates, Any], Any] | None  # (g, positions (B,N)) -> (B,N,...)
    slope: Callable[[BatchStates, BatchContext], tuple[BatchEnergies, BatchStates]]
    dropped: Callable[[BatchStates, BatchContext, DropoutMask], BatchStates] | None


def over_tokens(function: Callable) -> Callable:
    """A function of one token `(params, g, context)` as one of all: `(params, g, around)`."""
    of_sequence = jax.vmap(function, (None, 0, OVER_TOKENS))
    of_batch = jax.vmap(of_sequence, (None, 0, OVER_SEQUENCES))
    return lambda params, g, around: of_batch(params, g, around.contexts())


def bind(
    energy: Energy, params: Params, kernel: Kernel | None = None, dtype: str = "float32"
) -> Term:
    """A term of an energy.

    Args:
      energy: a registered one.
      params: all that its table names.
      kernel: a faster form; None: plain automatic differentiation of the definition.
      dtype: that the kernel computes in, and in which memory is kept. Definitions are always
        evaluated in float32 at least.
    """
    memory = _memory(energy.memory, params, dtype) if energy.memory else None
    if kernel is None:
        slope = over_tokens(jax.value_and_grad(energy.function, argnums=1))
        dropped = _dropped(energy) if energy.scores else None
        call = lambda f: lambda g, around, *more: f(params, g, _widened(around), *more)
        return Term(memory, call(slope), dropped and call(dropped))
    return _of_kernel(memory, params, kernel, dtype)


def _of_kernel(memory, params: Params, kernel: Kernel, dtype: str) -> Term:
    narrow = {n: value.astype(dtype) if value.ndim else value for n, value in params.items()}

    def fast_slope(g: BatchStates, around: BatchContext):
        energies, pull = jax.vjp(lambda q: kernel.energies(narrow, q, around), g.astype(dtype))
        return energies, pull(jnp.ones_like(energies))[0]

    def fast_dropped(g: BatchStates, around: BatchContext, keep: DropoutMask) -> BatchStates:
        assert kernel.dropped is not None
        return kernel.dropped(narrow, g.astype(dtype), around, keep)

    return Term(memory, fast_slope, fast_dropped if kernel.dropped else None)


def _memory(memory: Callable, params: Params, dtype: str) -> Callable[[BatchStates, Any], Any]:
    narrow = {name: value.astype(dtype) for name, value in params.items()}
    of_batch = jax.vmap(jax.vmap(lambda g, position: memory(narrow, g, position)))
    return lambda g, positions: of_batch(g.astype(dtype), positions)


def _dropped(energy: Energy) -> Callable:
    """The gradient of an attention energy with its weights, dE/ds, dropped out."""
    scores_of = energy.scores
    assert scores_of is not None

    def of_token(params: Params, g, context: Context, keep: Float[Array, "H K"]):
        scores, pull = jax.vjp(lambda g: scores_of(params, g, context), g)
        weights = jax.grad(lambda s: associative_memory(params, s, context.mask))(scores)
        return pull(keep * weights)[0]

    def of_batch(params: Params, g: BatchStates, around: BatchContext, keep: DropoutMask):
        of_sequence = jax.vmap(of_token, (None, 0, OVER_TOKENS, 1))
        return jax.vmap(of_sequence, (None, 0, OVER_SEQUENCES, 0))(
            params, g, around.contexts(), keep
        )

    return of_batch


def _widened(around: BatchContext) -> BatchContext:
    return around._replace(memory=jax.tree.map(at_least_float32, around.memory))


def combine(
    combination: Combination,
    params: Params,
    slopes: Mapping[str, tuple[BatchEnergies, BatchStates]],
) -> tuple[BatchEnergies, BatchStates]:
    """Energy and gradient of the whole from those of its terms, by the chain rule."""
    energies = jnp.stack([energy for energy, _ in slopes.values()], axis=-1)
    function = lambda e: combination.function(params, e)
    shares = jax.vmap(jax.vmap(jax.grad(function)))(energies)
    gradients = [
        shares[..., k, None] * gradient.astype(shares.dtype)
        for k, (_, gradient) in enumerate(slopes.values())
    ]
    return jax.vmap(jax.vmap(function))(energies), sum(gradients[1:], gradients[0])
