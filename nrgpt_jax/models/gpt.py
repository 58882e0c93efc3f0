"""The transformer baselines: GPT, GPT_Rec (one block, T times) and GPT_Rec_parallel.

Pre-norm blocks with a ReLU MLP, as in the paper's release: a block is a pure function of its
parameters, and goes through the loop that the energy models use.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Int

from nrgpt_jax.array_types import (
    BatchStates,
    Params,
    PerSequence,
    RowKeys,
    StepKeys,
    Tokens,
    at_least_float32,
)
from nrgpt_jax.core import caches
from nrgpt_jax.core.contexts import CausalMask
from nrgpt_jax.core.dynamics import RolloutOptions, Step, rollout, rollout_n
from nrgpt_jax.core.parameters import Table, constant, matrix, vector
from nrgpt_jax.core.step import State
from nrgpt_jax.kernels.layer_norm import layer_norm
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.models.language_model import Cache, LanguageModel

ATTENTION: Table = {
    "query": matrix("D H Y", uses=1),
    "key": matrix("D H Y", uses=1),
    "value": matrix("D H Y", uses=1),
    "projection": matrix("H Y D", uses=1),
    "bias": vector("D"),
}
MLP: Table = {
    "up": matrix("D M", uses=1),
    "up_bias": vector("M"),
    "down": matrix("M D", uses=1),
    "down_bias": vector("D"),
}
NORM: Table = {"gain": constant(1.0, "D"), "bias": vector("D")}
BLOCK: Table = {"attention": ATTENTION, "mlp": MLP, "norm1": NORM, "norm2": NORM}


def attend(
    params: Params, x: BatchStates, rows: Cache | None, causal_mask: CausalMask, drop: "Dropout"
) -> tuple[BatchStates, Cache | None]:
    """Causal multi-head attention, softmax(Q K^T / sqrt(Y)) V, then a biased projection.

    Returns:
      What it adds, and the rows (B,S,H,Y) of this step's cache with these keys and values.
    """
    q, k, v = (jnp.einsum("bnd,dhy->bnhy", x, params[n]) for n in ("query", "key", "value"))
    if rows is not None:
        rows = {n: caches.write(rows[n], new, causal_mask.at) for n, new in (("k", k), ("v", v))}
    if rows is not None and causal_mask.at is not None:
        k, v = rows["k"], rows["v"]
    mask_BxNxK = causal_mask.mask(x.shape[1], k.shape[1])
    scores = jnp.einsum("bnhy,bkhy->bhnk", q * q.shape[-1] ** -0.5, k)
    masked = jnp.where(mask_BxNxK[:, None], at_least_float32(scores), -jnp.inf)
    weights_BxHxNxK = drop(jax.nn.softmax(masked, axis=-1)).astype(v.dtype)
    out = jnp.einsum("bhnk,bkhy->bnhy", weights_BxHxNxK, v)
    out = jnp.einsum("bnhy,hyd->bnd", out, params["projection"]) + params["bias"][None, None]
    return drop(out), rows


def mlp(params: Params, x: BatchStates, drop: "Dropout") -> BatchStates:
    """W2 relu(W1 x + b1) + b2, hidden width M."""
    hidden = jax.nn.relu(x @ params["up"] + params["up_bias"][None, None])
    return drop(hidden @ params["down"] + params["down_bias"][None, None])


class Dropout:
    """Dropout at one rate, each call with keys of its own; without keys the identity."""

    def __init__(self, keys: RowKeys | None, rate: float):
        self.keys, self.rate, self.calls = keys, rate, 0

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.keys is None:
            return x
        self.calls += 1
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, self.calls)
        draw = partial(jax.random.bernoulli, p=1 - self.rate, shape=x.shape[1:])
        keep = jax.vmap(draw)(keys)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


class GPT(LanguageModel):
    """The three baselines.

    The fields are those of `config.model`; with `parallel` a block adds its attention and its
    MLP side by side.
    """

    parallel: bool = False

    @nn.nowrap
    def block_table(self) -> Table:
        """The parameters of one block."""
        return BLOCK

    @nn.nowrap
    def pair_flops(self) -> float:
        """Scores and averages, half of the square each."""
        return 2.0 * self.context_length * self.embed_dim

    @nn.nowrap
    def block(
        self,
        params: Any,
        x: BatchStates,
        rows: Cache | None,
        causal_mask: CausalMask,
        keys: RowKeys | None,
    ) -> tuple[BatchStates, Cache | None]:
        """One transformer block: the states after it, and its rows of the cache."""
        drop = Dropout(keys, self.dropout)
        narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(self.dtype), tree)
        norm = lambda name, x: layer_norm(params[name], x).astype(self.dtype)
        attention, of_mlp = narrow(params["attention"]), narrow(params["mlp"])
        update, rows = attend(attention, norm("norm1", x), rows, causal_mask, drop)
        attended = x + update.astype(x.dtype)
        out = mlp(of_mlp, norm("norm2", x if self.parallel else attended), drop)
        return attended + out.astype(x.dtype), rows

    @nn.nowrap
    def _steps(self, causal_mask: CausalMask) -> tuple[dict[str, Any], Step]:
        """(inputs of the T steps, the step); its rows of a cache are an input and an output."""
        inputs, block_of = self.layer_schedule(self.group_params("block"))

        def step(state: State, inputs_t: Any) -> tuple[State, Cache | None]:
            extras = inputs_t.get("cache"), causal_mask, inputs_t.get("keys")
            x, rows = self.block(block_of(inputs_t), state.x, *extras)
            return state._replace(x=x), rows

        return {"step": jnp.arange(self.num_steps), **inputs}, step

    def after(self, x: BatchStates, options: RolloutOptions, keys: StepKeys | None = None) -> State:
        assert options.context is None, "a block of a transformer has no memory apart from its step"
        inputs, step = self._steps(CausalMask(strict=False))
        if keys is not None:
            inputs["keys"] = keys
        unroll, remat, num_skipped_steps = self.scan_unroll, self.remat, options.num_skipped_steps
        state = options.begin or _start(x)
        return rollout(
            step, state, inputs, unroll=unroll, remat=remat, num_skipped_steps=num_skipped_steps
        )[0]

    def rollout_n(self, tokens: Tokens, count: jax.Array) -> State:
        inputs, step = self._steps(CausalMask(strict=False))
        first = jax.tree.map(lambda leaf: leaf[0], inputs)
        return rollout_n(step, _start(self.embed(tokens)), first, count)

    def cache_row(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the key and the value of a token, in one step."""
        return dict.fromkeys("kv", (self.num_heads, self.embed_dim // self.num_heads))

    def forward_cached(
        self,
        x: BatchStates,
        cache: Cache,
        position: PerSequence | None,
        decoding: Decoding,
        active: Bool[Array, "B P"] | None = None,
    ) -> tuple[BatchStates, Cache, Int[Array, "B P"]]:
        del active  # every token makes all steps
        self.check_decoding(decoding)
        inputs, step = self._steps(CausalMask(False, position))
        inputs["cache"] = cache
        state, new = rollout(step, _start(x), inputs, unroll=self.scan_unroll)
        return state.x, new, jnp.full(x.shape[:2], self.num_steps)


def _start(x: BatchStates) -> State:
    return State(x, (), None, jnp.zeros((), jnp.int32))
