"""The transformer baselines: GPT, GPT_Rec (one block, T times) and GPT_Rec_parallel.

Pre-norm blocks with a ReLU MLP, as in the paper's release. A block is a pure function of its
parameters, and runs in the same rollout as the energy models.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from nrgpt_jax import ops
from nrgpt_jax.array_types import BatchStates, Params, PerSequence, RowKeys, StepKeys
from nrgpt_jax.core.block import State, Step, positions, write
from nrgpt_jax.core.norms import layer_norm
from nrgpt_jax.core.parameters import Table, constant, matrix, vector
from nrgpt_jax.models.language_model import Cache, LanguageModel, Record

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
    params: Params,
    x: BatchStates,
    cache: tuple[Cache, jax.Array] | None,
    position: PerSequence | None,
    drop: "Dropout",
) -> tuple[BatchStates, Cache | None]:
    """Causal multi-head attention, softmax(Q K^T / sqrt(Y)) V, then a biased projection.

    Args:
      params, x: parameters and input of the attention.
      cache: arrays (T,B,S,H,Y), and the step at which keys and values are written.
      position: as in `LanguageModel.embed`.
      drop: dropout of the weights and of the output.

    Returns:
      The update of the states, and the cache with these keys and values.
    """
    rows = None
    q, k, v = (jnp.einsum("bnd,dhy->bnhy", x, params[n]) for n in ("query", "key", "value"))
    if cache is not None:
        stored, step = cache
        rows = {n: write(stored[n], new, position, step=step) for n, new in (("k", k), ("v", v))}
        k, v = (k, v) if position is None else (rows["k"][step], rows["v"][step])
    mask_BxNxK = ops.causal_mask(positions(position, x), k.shape[1], strict=False)
    scores = jnp.einsum("bnhy,bkhy->bhnk", q * q.shape[-1] ** -0.5, k)
    masked = jnp.where(mask_BxNxK[:, None], ops.at_least_float32(scores), -jnp.inf)
    weights_BxHxNxK = drop(jax.nn.softmax(masked, axis=-1)).astype(v.dtype)
    out = jnp.einsum("bhnk,bkhy->bnhy", weights_BxHxNxK, v)
    out = jnp.einsum("bnhy,hyd->bnd", out, params["projection"]) + params["bias"][None, None]
    return drop(out), rows


def mlp(params: Params, x: BatchStates, drop: "Dropout") -> BatchStates:
    """W2 relu(W1 x + b1) + b2, hidden width M."""
    hidden = jax.nn.relu(x @ params["up"] + params["up_bias"][None, None])
    return drop(hidden @ params["down"] + params["down_bias"][None, None])


class Dropout:
    """Dropout at one rate, with different PRNG keys in every call; the identity without keys."""

    def __init__(self, keys: RowKeys | None, rate: float):
        self.keys, self.rate, self.calls = keys, rate, 0

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.keys is None:
            return x
        self.calls += 1
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, self.calls)
        bernoulli = partial(jax.random.bernoulli, p=1 - self.rate, shape=x.shape[1:])
        keep = jax.vmap(bernoulli)(keys)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


class GPT(LanguageModel):
    """The three baselines.

    The fields are those of `config.model`; if `parallel`, the attention and the MLP of a block act
    in parallel.
    """

    parallel: bool = False

    @nn.nowrap
    def block_table(self) -> Table:
        """The parameters of one block."""
        return BLOCK

    @nn.nowrap
    def pair_flops(self) -> float:
        """FLOPs per token and step of scores and averages, over half of the square each."""
        return 2.0 * self.context_length * self.embed_dim

    @nn.nowrap
    def block(
        self,
        params: Any,
        x: BatchStates,
        cache: tuple[Cache, jax.Array] | None,
        position: PerSequence | None,
        keys: RowKeys | None,
    ) -> tuple[BatchStates, Cache | None]:
        """Run one transformer block; return the states, and the cache with this step written."""
        drop = Dropout(keys, self.dropout)
        narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(self.dtype), tree)
        norm = lambda name, x: layer_norm(params[name], x).astype(self.dtype)
        attention, of_mlp = narrow(params["attention"]), narrow(params["mlp"])
        update, rows = attend(attention, norm("norm1", x), cache, position, drop)
        attended = x + update.astype(x.dtype)
        out = mlp(of_mlp, norm("norm2", x if self.parallel else attended), drop)
        return attended + out.astype(x.dtype), rows

    @nn.nowrap
    def steps(
        self,
        x: BatchStates,
        position: PerSequence | None = None,
        cache: Any = None,
        dropout_keys: StepKeys | None = None,
        record: Record | None = None,
    ) -> tuple[State, Any, Step]:
        """See `LanguageModel.steps`."""
        assert record is None, "a transformer has no energy to record"
        inputs, block_of = self.layer_schedule(self.group_params("block"))
        inputs |= {"step": jnp.arange(self.num_steps), "dropout": dropout_keys}

        def step(state: State, inputs_t: Any) -> tuple[State, None]:
            cache = None if state.cache is None else (state.cache, state.step)
            options = cache, position, inputs_t["dropout"]
            with ops.implementation(self.implementation):
                x, rows = self.block(block_of(inputs_t), state.x, *options)
            return State(x, (), rows, state.step + 1), None

        return State(x, (), cache, jnp.zeros((), jnp.int32)), inputs, step

    def cache_row(self) -> Any:
        """Return the shapes of the key and the value of a token in one step."""
        shape = self.num_heads, self.embed_dim // self.num_heads
        return dict.fromkeys("kv", jax.ShapeDtypeStruct(shape, self.dtype))
