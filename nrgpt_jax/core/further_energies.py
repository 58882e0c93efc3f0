"""Energies beyond the paper, registered beside those of `core.energies`."""

import jax.numpy as jnp

from nrgpt_jax.array_types import Params
from nrgpt_jax.core.context import Context
from nrgpt_jax.core.energies import Energies, States, energy, feedforward
from nrgpt_jax.core.parameters import matrix, positive, vector
from nrgpt_jax.ops import at_least_float32, dot, gelu, linear, linear_transpose, standardize

GATED = {"W1": matrix("D M", uses=1), "b1": vector("M"), "W2": matrix("D M")}


@feedforward("FFG", GATED, contextual=True, batched=True)
def ffg(params: Params, g: States, context: Context) -> Energies:
    """E = -(1/2) gelu(g' W1 + b1) . (g W2)^2, with a gate of g' = g that is not differentiated.

    Its gradient moves a token like a gated MLP, by W2^T (gelu(g W1 + b1) * (g W2)), with tied up-
    and down-projections. There is no guarantee that the energy falls.
    Source: causal energy minimisation (arXiv 2605.07588).
    """
    return _gated(params, context.g.astype(g.dtype), g)


@feedforward("FFG_exact", {**GATED, "W1": matrix("D M")}, exact=True, batched=True)
def ffg_exact(params: Params, g: States) -> Energies:
    """E = -(1/2) gelu(g W1 + b1) . (g W2)^2: FFG with a differentiated gate."""
    return _gated(params, g, g)


@feedforward("FFG_first", GATED, contextual=True, exact=True, batched=True)
def ffg_first(params: Params, g: States, context: Context) -> Energies:
    """E = -(1/2) gelu(n(x0) W1 + b1) . (g W2)^2, n LayerNorm without gain and bias: an input gate.

    The gate is constant during the descent, which makes the energy a quadratic form.
    """
    return _gated(params, standardize(context.first).astype(g.dtype), g)


def _gated(params: Params, gate_g: States, g: States) -> Energies:
    gate = gelu(linear(gate_g, params["W1"], params["b1"]))
    return -0.5 * dot(gate, linear(g, params["W2"]) ** 2)


@feedforward("FF3", {"W1": matrix("D M"), "b1": vector("M")}, exact=True, batched=True)
def ff3(params: Params, g: States) -> Energies:
    """E = -(1/3) sum relu(g W1 + b1)^3: the gradient is a squared-ReLU MLP with tied matrices.

    It has one matrix where FF2W has two: with equal parameter counts it is twice as wide.
    """
    hidden = jnp.maximum(linear(g, params["W1"], params["b1"]), 0.0)
    return -dot(hidden**2, hidden) / 3


@energy("injection", {"W": matrix("D D", uses=1)}, exact=True, batched=True, wide=True)
def injection(params: Params, g: States, context: Context) -> Energies:
    """E = -g . (W x0), with x0 the token's state before the first step: input injection."""
    return -dot(g, linear_transpose(context.first.astype(g.dtype), params["W"]))


@energy("leak", {"size": positive(0.1)}, exact=True, batched=True, wide=True)
def leak(params: Params, g: States, context: Context) -> Energies:
    """E = size (g . x - L(x)), with gradient size x in g: a leak proportional to the state.

    At a fixed point x = -(dE/dg) / size, E the sum of the other terms. L is the Lagrangian of a
    norm without gain, grad L(x) = g; the bracket is its Legendre transform, a function of g alone,
    so x is not differentiated.
    """
    return params["size"] * (dot(at_least_float32(g), context.x) - context.lagrangian)
