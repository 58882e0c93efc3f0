"""Energies, as the paper writes them: one token, one scalar.

An energy is a pure function

    energy(params, g (D,), context) -> ()

of a token's state g = norm(x), of the parameters in its own table, and of a `Context`: the
memory of the tokens it may look at, which of these it sees, where it stands, its state x and
its first state. Its `jax.grad` in g is what moves the token. The context is an argument of its
own that the token does not differentiate, so that the future does not leak into the past.

Attention energies have in common how scores become an energy (`associative_memory`), so what is
registered of one is its scores. Batched forms of the same energies, faster on a given machine,
are in `nrgpt_jax.kernels`; an energy needs none.

To add one, write the function, decorate it with `@energy(name, table)`, and name it in
`config.model.energies`; a feed-forward energy registered by `@feedforward("NAME", table)` is
also trained as the model `NRGPT_H_NAME`.

Source: NRGPT (arXiv 2512.16762), section 2; FF1, FF2 and FF2W are named as in its release.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import Params, accumulator_type, at_least_float32
from nrgpt_jax.core.contexts import Context
from nrgpt_jax.core.parameters import Specs, constant, fixed, matrix, positive, vector
from nrgpt_jax.core.registry import Registry

Token = Float[Array, "D"]
Scalar = Float[Array, ""]
Scores = Float[Array, "H K"]

ROPE_BASE = 10_000.0


class Energy(NamedTuple):
    """A registered energy.

    `memory(params, g, position)` is what it keeps of a token for those that look back at it.
    `scores` are the inner products of an attention energy (H,K), whose `associative_memory` it
    is; `width` names the axes of one such product, heads first. `exact` declares, for
    `core.certificates`, that its gradient in g is all of its change when the token moves; not so
    where it reads `Context.g`, or tokens that are not in the context.
    """

    function: Callable[[Params, Token, Context], Scalar]
    specs: Specs
    label: str  # under which its values and its parameters are found
    memory: Callable[[Params, Token, Int[Array, ""]], Any] | None = None
    scores: Callable[[Params, Token, Context], Scores] | None = None
    width: str | None = None
    exact: bool = False


ENERGIES: Registry[Energy] = Registry("energy")
RESERVED = ("total", "combination", "norm", "rate", "rule", "gain", "eta")  # beside the terms


def energy(name: str, specs: Specs, *, label: str = "", memory=None, exact: bool = False):
    """Registers an energy of one token.

    Args:
      name: as in `config.model.energies`.
      specs: the table of every parameter that it reads.
      label: under which its values and parameters are found; its name by default.
      memory: `(params, g, position) -> array`, what it keeps of each token of a context.
      exact: as of `Energy`.
    """
    label = _free(label or name)
    entry = lambda function: Energy(function, specs, label, memory, exact=exact)
    return ENERGIES.register(_free(name), entry)


def _free(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"energy {name!r}: the name is taken, as {', '.join(RESERVED)} are")
    return name


def feedforward(name: str, specs: Specs, *, gated: bool = False, exact: bool = False):
    """Registers an energy of the token alone, trained as the model `NRGPT_H_<name>`.

    Args:
      name: what follows `NRGPT_H_`.
      specs: the table of what the function reads; a scale is added.
      gated: whether it is a function of `(params, g, own)` rather than of `(params, g)`, with
        the token's g once more, as it stands: nothing promises then that the energy falls.
      exact: as of `Energy`.
    """
    scale = {"scale": constant(1.0)}  # the release's scale_ff

    def entry(function: Callable[..., Scalar]) -> Energy:
        def scaled(params: Params, g: Token, context: Context) -> Scalar:
            more = (context.g,) if gated else ()
            return params["scale"] * function(params, g, *more)

        return Energy(scaled, {**specs, **scale}, "feedforward", exact=exact)

    return ENERGIES.register(_free(name), entry)


def attention(
    name: str, specs: Specs, *, width: str | None = None, memory=None, exact: bool = False
):
    """Registers an attention energy by its scores `(params, g, context) -> (H,K)`.

    Args:
      name: as in `config.model.attention` and `config.model.energies`.
      specs: the table of what the scores read; alpha and beta are added.
      width: the axes of the products that scores are, "H D", for FLOPs; None: not known.
      memory: `(params, g, position) -> array`; by default the state g.
      exact: as of `Energy`.
    """
    table = {**specs, "alpha": fixed(1.0, "H"), "beta": fixed(1.0)}

    def entry(scores: Callable[[Params, Token, Context], Scores]) -> Energy:
        def function(params: Params, g: Token, context: Context) -> Scalar:
            return associative_memory(params, scores(params, g, context), context.mask)

        keep = memory or (lambda params, g, position: g)
        return Energy(function, table, "attention", keep, scores, width, exact)

    return ENERGIES.register(_free(name), entry)


# Attention -------------------------------------------------------------------------------------


def associative_memory(params: Params, scores: Scores, mask: Bool[Array, "K"]) -> Scalar:
    """E = -(1/beta) sum_h alpha_h log sum_B exp(beta s_hB), B in the context; 0 where it is empty.

    The paper's attention energy; the release has alpha = beta = 1.
    """
    beta = params["beta"].astype(scores.dtype)
    return -jnp.vdot(params["alpha"], log_sum_exp(beta * scores, mask)) / beta


def log_sum_exp(scores: Scores, mask: Bool[Array, "K"]) -> Float[Array, "H"]:
    """log sum_B exp(s_hB) over the B of the mask; 0, with no gradient, where there is none."""
    scores = jnp.where(mask[None], at_least_float32(scores), -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    total = jnp.sum(jnp.exp(scores - peak[:, None]), axis=-1)
    empty = total == 0.0
    return jnp.where(empty, 0.0, jnp.log(jnp.where(empty, 1.0, total)) + peak)


@attention("full_rank", {"J": matrix("H D D", uses=1)}, width="H D", exact=True)
def full_rank(params: Params, g: Token, context: Context) -> Scores:
    """s_hB = g_B . J_h g, with J_h of full rank (the release)."""
    return jnp.einsum("hed,d,ke->hk", params["J"], g, context.memory)


@attention(
    "low_rank",
    {"W_Q": matrix("H Y D"), "W_K": matrix("H Y D", uses=1)},
    width="H Y",
    memory=lambda params, g, position: jnp.einsum("d,hyd->hy", g, params["W_K"]),
    exact=True,
)
def low_rank(params: Params, g: Token, context: Context) -> Scores:
    """s_hB = (W_K,h g_B) . (W_Q,h g): J_h = W_K,h^T W_Q,h has rank Y (the paper's derivation)."""
    return jnp.einsum("d,hyd,khy->hk", g, params["W_Q"], context.memory)


@attention(
    "full_rank_rope",
    {"J": matrix("H D D")},
    width="H D",
    memory=lambda params, g, position: rotate(g, position),
    exact=True,
)
def full_rank_rope(params: Params, g: Token, context: Context) -> Scores:
    """s_hB = (R_B g_B) . (R_A J_h g): both sides rotated by their positions.

    Only distances count, R_B^T R_A = R_(A-B), and `jax.grad` rotates the gradient back.
    """
    turned = rotate(jnp.einsum("hed,d->he", params["J"], g), context.position)
    return jnp.einsum("he,ke->hk", turned, context.memory)


@attention(
    "low_rank_rope",
    {"W_Q": matrix("H Y D"), "W_K": matrix("H Y D", uses=1)},
    width="H Y",
    memory=lambda params, g, position: rotate(jnp.einsum("d,hyd->hy", g, params["W_K"]), position),
    exact=True,
)
def low_rank_rope(params: Params, g: Token, context: Context) -> Scores:
    """s_hB = (R_B W_K,h g_B) . (R_A W_Q,h g): the scores of a rotary transformer."""
    query = rotate(params["W_Q"] @ g, context.position)
    return jnp.einsum("hy,khy->hk", query, context.memory)


def rotate(x: Float[Array, "*H Y"], position: Int[Array, ""]) -> Float[Array, "*H Y"]:
    """R_A x: pairs of entries (i, i + Y/2) turn by A / 10000^(2i/Y); an odd last one stays.

    Source: RoPE (arXiv 2104.09864), section 3.2, with the halves as pairs.
    """
    half = x.shape[-1] // 2
    wide = accumulator_type(x)
    speed = jnp.asarray(ROPE_BASE ** (-np.arange(half) / max(half, 1)), wide)
    angle = position.astype(wide) * speed
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def turn(row):
        a, b = row[:half].astype(wide), row[half : 2 * half].astype(wide)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos]).astype(x.dtype)
        return jnp.concatenate([turned, row[2 * half :]])

    return turn(x) if x.ndim == 1 else jax.vmap(turn)(x)


# Feed-forward ----------------------------------------------------------------------------------


def gelu(z: Float[Array, "*M"]) -> Float[Array, "*M"]:
    """z Phi(z), elementwise, with Phi the normal cumulative distribution (the exact GELU)."""
    return 0.5 * z * (1.0 + jax.lax.erf(z * 0.5**0.5))


@feedforward("FF1", {"W1": matrix("D M"), "b1": vector("M")}, exact=True)
def ff1(params: Params, g: Token) -> Scalar:
    """E = -|| gelu(g W1 + b1) ||^2."""
    return -jnp.sum(gelu(g @ params["W1"] + params["b1"]) ** 2)


@feedforward(
    "FF2",
    {"W1": matrix("D D"), "b1": vector("D"), "W2": matrix("D M"), "b2": vector("M")},
    exact=True,
)
def ff2(params: Params, g: Token) -> Scalar:
    """E = -|| gelu(gelu(g W1 + b1) W2 + b2) ||^2."""
    hidden = gelu(g @ params["W1"] + params["b1"])
    return -jnp.sum(gelu(hidden @ params["W2"] + params["b2"]) ** 2)


@feedforward(
    "FF2W",
    {"W1": matrix("D M"), "b1": vector("M"), "W2": matrix("D M"), "b2": vector("D")},
    exact=True,
)
def ff2w(params: Params, g: Token) -> Scalar:
    """E = -g . (W2 gelu(g W1 + b1) + b2)."""
    return -jnp.vdot(g, params["W2"] @ gelu(g @ params["W1"] + params["b1"]) + params["b2"])


# Besides the paper's ---------------------------------------------------------------------------


GATED = {"W1": matrix("D M", uses=1), "b1": vector("M"), "W2": matrix("D M")}


@feedforward("FFG", GATED, gated=True)
def ffg(params: Params, g: Token, own: Token) -> Scalar:
    """E = -(1/2) gelu(g' W1 + b1) . (g W2)^2, with a gate of g' = g that is not differentiated.

    Its gradient moves a token as a gated MLP does, by W2^T (gelu(g W1 + b1) * (g W2)): the matrix
    that leads down is that which leads up.
    Source: causal energy minimisation (arXiv 2605.07588).
    """
    gate = gelu(own @ params["W1"] + params["b1"])
    return -0.5 * jnp.vdot(gate, (g @ params["W2"]) ** 2)


@energy("injection", {"W": matrix("D D", uses=1)}, exact=True)
def injection(params: Params, g: Token, context: Context) -> Scalar:
    """E = -g . (W x0), with x0 the token's state before the first step: its input is recalled."""
    return -jnp.vdot(g, params["W"] @ context.first)


@energy("leak", {"size": positive(0.1)}, exact=True)
def leak(params: Params, g: Token, context: Context) -> Scalar:
    """E = size (g . x - L(x)), whose gradient in g is size x: with it x = -(dE/dg) / size at rest.

    L is the norm's Lagrangian, grad L(x) = g, which holds of norms without gain; the bracket is
    its Legendre transform, a function of g alone, so x is not differentiated.
    """
    return params["size"] * (jnp.vdot(g, context.x) - context.lagrangian)
