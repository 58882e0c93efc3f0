"""Energies, as the paper writes them: pure scalar functions of a token.

An energy is a pure function

    energy(params, g, context) -> E

of a token's g = norm(x), of the parameters in its own table, and of a `Context`: the keys of the
tokens it may look at, which of these it sees, where it stands, its state x and its first state.
Its `jax.grad` in g is what moves the token, in training, decoding and analysis alike. The context
is an argument of its own that the token does not differentiate, so that the future does not leak
into the past.

The energies here are written over the last axis: g (D,) of a token gives (), g (B,N,D) of all gives
(B,N), and they are registered with `batched=True`. One that is written for a single token alone is
taken over all of them by `jax.vmap`: the same numbers, slower. Attention energies are a query and a
key; how these become an energy is `associative_memory`.

To add one, write the function, decorate it with `@energy(name, table)`, and name it in
`config.model.energies`; a feed-forward energy registered by `@feedforward("NAME", table)` is
also trained as the model `NRGPT_H_NAME`.

Source: NRGPT (arXiv 2512.16762), section 2; FF1, FF2 and FF2W are named as in its release.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrgpt_jax.array_types import Params
from nrgpt_jax.core.context import Context, over_contexts, over_tokens
from nrgpt_jax.core.parameters import Specs, constant, fixed, matrix, positive, vector
from nrgpt_jax.ops import (
    along_last_axis,
    at_least_float32,
    dot,
    gelu,
    linear,
    linear_transpose,
    log_sum_exp,
    rotate,
    standardize,
)
from nrgpt_jax.registry import Registry

States = Float[Array, "*B D"]
Energies = Float[Array, "*B"]
Positions = Int[Array, "*B"]
Queries = Float[Array, "*B H E"]
Query = Callable[[Params, States, Positions], Queries]


class Energy(NamedTuple):
    """A registered energy.

    `key(params, g, position)` is a tree of what it keeps of a token for those that look back at it,
    `query` the same of an attention energy's own side. `exact` declares, for `core.certificates`,
    that its gradient in g is all of its change when the token moves; not so where it reads
    `Context.g`, or tokens that are not in the context.
    """

    function: Callable[[Params, States, Context], Energies]
    specs: Specs
    label: str  # under which its values and its parameters are found
    key: Callable[[Params, States, Positions], Any] | None = None
    query: Query | None = None
    exact: bool = False
    wide: bool = False  # computed in float32 at least


ENERGIES: Registry[Energy] = Registry("energy")
RESERVED = ("total", "combination", "norm", "rate", "rule", "gain", "eta")  # beside the terms


def energy(name: str, specs: Specs, *, label="", key=None, exact=False, batched=False, wide=False):
    """Registers an energy `(params, g, context) -> E`.

    Args:
      name: as in `config.model.energies`.
      specs: the table of every parameter that it reads.
      label: under which its values and parameters are found; its name by default.
      key, exact: as of `Energy`.
      batched: written over the last axis; else vmapped, and computed in float32 at least.
      wide: computed so even if it is batched.
    """
    label, of_key = _free(label or name), key if batched or key is None else over_tokens(key)

    def entry(function: Callable[[Params, States, Context], Energies]) -> Energy:
        of_all = function if batched else over_contexts(function)
        return Energy(of_all, specs, label, of_key, None, exact, wide or not batched)

    return ENERGIES.register(_free(name), entry)


def _free(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"energy {name!r}: the name is taken, as {', '.join(RESERVED)} are")
    return name


def feedforward(name: str, specs: Specs, *, contextual=False, exact=False, batched=False):
    """Registers an energy of the token alone, trained as the model `NRGPT_H_<name>`.

    Args:
      name: what follows `NRGPT_H_`.
      specs: the table of what the function reads; a scale is added.
      contextual: whether it is a function of `(params, g, context)` rather than of `(params, g)`.
      exact, batched: as of `energy`.
    """
    scale = {"scale": constant(1.0)}  # the release's scale_ff

    def entry(function: Callable[..., Energies]) -> Energy:
        def scaled(params: Params, g: States, context: Context) -> Energies:
            return params["scale"] * function(params, g, *((context,) if contextual else ()))

        of_all, table = scaled if batched else over_contexts(scaled), {**specs, **scale}
        return Energy(of_all, table, "feedforward", None, None, exact, not batched)

    return ENERGIES.register(_free(name), entry)


def attention(name: str, specs: Specs, *, key=None, absorb=False, exact=False, batched=False):
    """Registers an attention energy by its query `(params, g, position) -> (...,H,E)`.

    Args:
      name: as in `config.model.attention` and `config.model.energies`.
      specs: the table of what query and key read; alpha and beta are added.
      key: `(params, g, position)` to (...,H,E), or (...,E) shared by all heads; by default g.
      absorb: whether the query, linear in g and the same at all positions, may act on the keys
        instead where there are as many of them: of its two products a step one is left.
      exact, batched: as of `energy`.
    """
    table = {**specs, "alpha": fixed(1.0, "H"), "beta": fixed(1.0)}
    of_key = key or (lambda params, g, position: g)

    def entry(query: Query) -> Energy:
        of_query, keep = (f if batched else over_tokens(f) for f in (query, of_key))

        function = partial(associative_memory, of_query, specs if absorb else None)
        return Energy(function, table, "attention", keep, of_query, exact, not batched)

    return ENERGIES.register(_free(name), entry)


def _absorbed(query: Query, specs: Specs, params: Params, keys: States, position: Positions):
    """A_h^T k for every key k (B,K,E), where query_h(g) = A_h g: (B,K,H,D)."""
    axes = {name: 0 if spec.axes[:1] == ("H",) else None for name, spec in specs.items()}

    def of_head(params: Params) -> States:
        one = {n: p[None] if axes[n] == 0 else p for n, p in params.items()}
        of_g = lambda g: query(one, g, position)[..., 0, :]
        return jax.linear_transpose(of_g, keys)(keys)[0]

    read = {name: params[name] for name in specs}
    return jax.vmap(of_head, (axes,), out_axes=2)(read)


# Attention -------------------------------------------------------------------------------------


def associative_memory(
    query: Query, absorbed: Specs | None, params: Params, g: States, context: Context
) -> Energies:
    """E = -(1/beta) sum_h alpha_h log sum_B exp(beta q_h . k_hB), B in the context; 0 where empty.

    The paper's attention energy; the release has alpha = beta = 1. Where there are as many queries
    as keys, a query A_h g whose table is `absorbed` acts on the keys: q_h . k = g . (A_h^T k).
    """
    position, strict, aligned = context.position, context.strict, context.aligned
    if absorbed is not None and aligned:
        q, k = g, _absorbed(query, absorbed, params, context.keys.astype(g.dtype), position)
    else:
        q, k = query(params, g, position), context.keys.astype(g.dtype)
    beta, options = params["beta"].astype(g.dtype), {"strict": strict, "aligned": aligned}
    values = log_sum_exp(beta * q, k, position, **options, dropout=context.dropout)
    alpha = along_last_axis(params["alpha"].astype(values.dtype), values)
    return -dot(alpha, values) / at_least_float32(beta)


@attention("full_rank", {"J": matrix("H D D", uses=1)}, absorb=True, exact=True, batched=True)
def full_rank(params: Params, g: States, position: Positions) -> Queries:
    """q_h = J_h g, k = g, with J_h of full rank (the release)."""
    width = g.shape[-1]
    query = g @ params["J"].reshape(-1, width).T  # as one product J needs no transposed copy
    return query.reshape(*g.shape[:-1], -1, width)


def low_rank_key(params: Params, g: States, position: Positions) -> Queries:
    """k_h = W_K,h g."""
    return jnp.einsum("...d,hyd->...hy", g, params["W_K"])


LOW_RANK = {"W_Q": matrix("H Y D"), "W_K": matrix("H Y D", uses=1)}


@attention("low_rank", LOW_RANK, key=low_rank_key, exact=True, batched=True)
def low_rank(params: Params, g: States, position: Positions) -> Queries:
    """q_h = W_Q,h g, k_h = W_K,h g: J_h = W_K,h^T W_Q,h has rank Y (the paper's derivation)."""
    return jnp.einsum("...d,hyd->...hy", g, params["W_Q"])


@attention(
    "full_rank_rope",
    {"J": matrix("H D D")},
    key=lambda params, g, position: rotate(g, position),
    exact=True,
    batched=True,
)
def full_rank_rope(params: Params, g: States, position: Positions) -> Queries:
    """q_h = R_A J_h g, k = R_B g: both sides rotated by their positions.

    Only distances count, R_B^T R_A = R_(A-B), and `jax.grad` rotates the gradient back.
    """
    return rotate(full_rank(params, g, position), position[..., None])


@attention(
    "low_rank_rope",
    LOW_RANK,
    key=lambda params, g, position: rotate(low_rank_key(params, g, position), position[..., None]),
    exact=True,
    batched=True,
)
def low_rank_rope(params: Params, g: States, position: Positions) -> Queries:
    """q_h = R_A W_Q,h g, k_h = R_B W_K,h g: the scores of a rotary transformer."""
    return rotate(low_rank(params, g, position), position[..., None])


# Feed-forward ----------------------------------------------------------------------------------


@feedforward("FF1", {"W1": matrix("D M"), "b1": vector("M")}, exact=True, batched=True)
def ff1(params: Params, g: States) -> Energies:
    """E = -|| gelu(g W1 + b1) ||^2."""
    hidden = gelu(linear(g, params["W1"], params["b1"]))
    return -dot(hidden, hidden)


@feedforward(
    "FF2",
    {"W1": matrix("D D"), "b1": vector("D"), "W2": matrix("D M"), "b2": vector("M")},
    exact=True,
    batched=True,
)
def ff2(params: Params, g: States) -> Energies:
    """E = -|| gelu(gelu(g W1 + b1) W2 + b2) ||^2."""
    hidden = gelu(linear(g, params["W1"], params["b1"]))
    hidden = gelu(linear(hidden, params["W2"], params["b2"]))
    return -dot(hidden, hidden)


@feedforward(
    "FF2W",
    {"W1": matrix("D M"), "b1": vector("M"), "W2": matrix("D M"), "b2": vector("D")},
    exact=True,
    batched=True,
)
def ff2w(params: Params, g: States) -> Energies:
    """E = -g . (W2 gelu(g W1 + b1) + b2)."""
    hidden = gelu(linear(g, params["W1"], params["b1"]))
    return -dot(g, linear_transpose(hidden, params["W2"], params["b2"]))


# Besides the paper's ---------------------------------------------------------------------------


GATED = {"W1": matrix("D M", uses=1), "b1": vector("M"), "W2": matrix("D M")}


@feedforward("FFG", GATED, contextual=True, batched=True)
def ffg(params: Params, g: States, context: Context) -> Energies:
    """E = -(1/2) gelu(g' W1 + b1) . (g W2)^2, with a gate of g' = g that is not differentiated.

    Its gradient moves a token as a gated MLP does, by W2^T (gelu(g W1 + b1) * (g W2)): the matrix
    that leads down is that which leads up. Nothing promises that the energy falls.
    Source: causal energy minimisation (arXiv 2605.07588).
    """
    return _gated(params, context.g.astype(g.dtype), g)


@feedforward("FFG_exact", {**GATED, "W1": matrix("D M")}, exact=True, batched=True)
def ffg_exact(params: Params, g: States) -> Energies:
    """E = -(1/2) gelu(g W1 + b1) . (g W2)^2: FFG with the gate in its gradient."""
    return _gated(params, g, g)


@feedforward("FFG_first", GATED, contextual=True, exact=True, batched=True)
def ffg_first(params: Params, g: States, context: Context) -> Energies:
    """E = -(1/2) gelu(n(x0) W1 + b1) . (g W2)^2, n without gain and bias: a gate of the input.

    The gate is constant during the descent, which makes the energy a quadratic form.
    """
    return _gated(params, standardize(context.first).astype(g.dtype), g)


def _gated(params: Params, gate_g: States, g: States) -> Energies:
    gate = gelu(linear(gate_g, params["W1"], params["b1"]))
    return -0.5 * dot(gate, linear(g, params["W2"]) ** 2)


@feedforward("FF3", {"W1": matrix("D M"), "b1": vector("M")}, exact=True, batched=True)
def ff3(params: Params, g: States) -> Energies:
    """E = -(1/3) sum relu(g W1 + b1)^3: its gradient is an MLP of squared ReLU with tied matrices.

    It has one matrix where FF2W has two: at equal parameters it is twice as wide.
    """
    hidden = jnp.maximum(linear(g, params["W1"], params["b1"]), 0.0)
    return -dot(hidden**2, hidden) / 3


@energy("injection", {"W": matrix("D D", uses=1)}, exact=True, batched=True, wide=True)
def injection(params: Params, g: States, context: Context) -> Energies:
    """E = -g . (W x0), with x0 the token's state before the first step: its input is recalled."""
    return -dot(g, linear_transpose(context.first.astype(g.dtype), params["W"]))


@energy("leak", {"size": positive(0.1)}, exact=True, batched=True, wide=True)
def leak(params: Params, g: States, context: Context) -> Energies:
    """E = size (g . x - L(x)), whose gradient in g is size x: x = -(dE/dg) / size at a fixed point.

    L is the norm's Lagrangian, grad L(x) = g, which holds of norms without gain; the bracket is
    its Legendre transform, a function of g alone, so x is not differentiated.
    """
    return params["size"] * (dot(at_least_float32(g), context.x) - context.lagrangian)
