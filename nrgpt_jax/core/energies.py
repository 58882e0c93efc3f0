"""Energies in the form of the paper: pure scalar functions of a token.

An energy is a pure function

    energy(params, g, context) -> E

of a token's g = norm(x), the parameters in its own table, and a `Context`: the keys of other
tokens, which of them are visible, and the token's position, state x and initial state. Its
`jax.grad` in g moves the token in training, decoding and analysis alike. The context is a separate
argument, not differentiated by the token, so future tokens do not leak into the past.

The energies here act on the last axis: g (D,) of one token gives (), g (B,N,D) gives (B,N). They
are registered with `batched=True`. An energy of a single token is vectorized by `jax.vmap`: the
same numbers, slower. An attention energy is defined by a query and a key, from which
`associative_memory` computes the energy.

To add one, write the function, decorate it with `@energy(name, table)`, and name it in
`config.model.energies`. A feed-forward energy registered by `@feedforward("NAME", table)` is also
available as the model `NRGPT_H_NAME`.

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
from nrgpt_jax.core.parameters import Specs, constant, fixed, matrix, vector
from nrgpt_jax.ops import (
    along_last_axis,
    at_least_float32,
    dot,
    gelu,
    linear,
    linear_transpose,
    log_sum_exp,
    rotate,
)
from nrgpt_jax.registry import Registry

States = Float[Array, "*B D"]
Energies = Float[Array, "*B"]
Positions = Int[Array, "*B"]
Queries = Float[Array, "*B H E"]
Query = Callable[[Params, States, Positions], Queries]


class Energy(NamedTuple):
    """A registered energy.

    `key(params, g, position)` is the tree of arrays that later tokens read of a token, `query` the
    query of an attention energy. `exact` declares, for `core.certificates`, that the gradient in g
    is the whole change of the energy when the token moves. It is false for an energy that reads
    `Context.g`, or tokens outside the context.
    """

    function: Callable[[Params, States, Context], Energies]
    specs: Specs
    label: str  # name of its values and parameters
    key: Callable[[Params, States, Positions], Any] | None = None
    query: Query | None = None
    exact: bool = False
    wide: bool = False  # computed in float32 at least


ENERGIES: Registry[Energy] = Registry("energy")
RESERVED = ("total", "combination", "norm", "rate", "rule", "gain", "eta")  # names beside the terms


def energy(name: str, specs: Specs, *, label="", key=None, exact=False, batched=False, wide=False):
    """Register an energy `(params, g, context) -> E`.

    Args:
      name: name in `config.model.energies`.
      specs: table of all parameters that it reads.
      label: name of its values and parameters; by default `name`.
      key, exact: as in `Energy`.
      batched: acts on the last axis; otherwise vmapped, and computed in float32 at least.
      wide: computed in float32 at least, even if batched.
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
    """Register an energy of the token alone, available as the model `NRGPT_H_<name>`.

    Args:
      name: suffix of the model's name.
      specs: table of the function's parameters; a scale is added.
      contextual: whether it is a function of `(params, g, context)` rather than of `(params, g)`.
      exact, batched: as in `energy`.
    """
    scale = {"scale": constant(1.0)}  # the release's scale_ff

    def entry(function: Callable[..., Energies]) -> Energy:
        def scaled(params: Params, g: States, context: Context) -> Energies:
            return params["scale"] * function(params, g, *((context,) if contextual else ()))

        of_all, table = scaled if batched else over_contexts(scaled), {**specs, **scale}
        return Energy(of_all, table, "feedforward", None, None, exact, not batched)

    return ENERGIES.register(_free(name), entry)


def attention(name: str, specs: Specs, *, key=None, absorb=False, exact=False, batched=False):
    """Register an attention energy by its query `(params, g, position) -> (...,H,E)`.

    Args:
      name: name in `config.model.attention` and `config.model.energies`.
      specs: table of the parameters of query and key; alpha and beta are added.
      key: `(params, g, position)` to (...,H,E), or (...,E) shared by all heads; by default g.
      absorb: whether the query, linear in g and equal at all positions, may act on the keys instead
        if there are as many of them; this saves one of its two products per step.
      exact, batched: as in `energy`.
    """
    table = {**specs, "alpha": fixed(1.0, "H"), "beta": fixed(1.0)}
    of_key = key or (lambda params, g, position: g)

    def entry(query: Query) -> Energy:
        of_query, keep = (f if batched else over_tokens(f) for f in (query, of_key))

        function = partial(associative_memory, of_query, specs if absorb else None)
        return Energy(function, table, "attention", keep, of_query, exact, not batched)

    return ENERGIES.register(_free(name), entry)


def _absorbed(query: Query, specs: Specs, params: Params, keys: States, position: Positions):
    """Compute A_h^T k, (B,K,H,D), for every key k (B,K,E), where query_h(g) = A_h g."""
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
    """E = -(1/beta) sum_h alpha_h log sum_B exp(beta q_h . k_hB), B in the context; 0 if empty.

    The paper's attention energy; the release has alpha = beta = 1. With as many queries as keys, a
    query A_h g with the table `absorbed` acts on the keys instead: q_h . k = g . (A_h^T k).
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
    query = g @ params["J"].reshape(-1, width).T  # one product avoids a transposed copy of J
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
    """q_h = R_A J_h g, k = R_B g: both rotated by their positions.

    Scores depend on relative positions only, R_B^T R_A = R_(A-B); `jax.grad` rotates the gradient
    back.
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
