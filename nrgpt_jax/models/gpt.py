"""The transformer baselines: GPT, GPT_Rec (one block, T times) and GPT_Rec_parallel.

Pre-norm blocks with a ReLU MLP, as in the paper's release. One `nn.scan` over the steps: GPT
stacks T blocks' parameters along a leading axis, the recurrent models share one block's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from nrgpt_jax.array_types import at_least_float32
from nrgpt_jax.core.attention import causal_mask
from nrgpt_jax.core.descent import Decoding
from nrgpt_jax.core.memory import write
from nrgpt_jax.core.norms import EPSILON
from nrgpt_jax.models.language_model import INIT, BatchStates, Cache, LanguageModel


class Attention(nn.Module):
    """Causal multi-head attention, softmax(Q K^T / sqrt(D/H)) V, then a biased projection."""

    num_heads: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: BatchStates, rows: Cache | None, position: jax.Array | None, train: bool
    ) -> tuple[BatchStates, Cache | None]:
        width = x.shape[-1]
        shape = (self.num_heads, width // self.num_heads)
        heads = lambda name: nn.DenseGeneral(
            shape, use_bias=False, kernel_init=INIT, dtype=self.dtype, name=name
        )
        q, k, v = (heads(name)(x) for name in ("query", "key", "value"))
        mask = causal_mask(x.shape[1], x.shape[1], strict=False)[None]
        if rows is not None:
            rows = {name: write(rows[name], new, position) for name, new in (("k", k), ("v", v))}
        if rows is not None and position is not None:
            k, v = rows["k"], rows["v"]
            mask = jnp.arange(k.shape[1])[None, None] <= position[:, None, None]
        weights_BxHxNxK = self._weights(q, k, mask)
        weights_BxHxNxK = nn.Dropout(self.dropout, deterministic=not train)(weights_BxHxNxK)
        out = jnp.einsum("bhnk,bkhy->bnhy", weights_BxHxNxK.astype(v.dtype), v)
        out = nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=INIT, dtype=self.dtype, name="projection"
        )(out)
        return nn.Dropout(self.dropout, deterministic=not train)(out), rows

    def _weights(self, q, k, mask) -> Float[Array, "B H N K"]:
        scores = jnp.einsum("bnhy,bkhy->bhnk", q * q.shape[-1] ** -0.5, k)
        return jax.nn.softmax(jnp.where(mask[:, None], at_least_float32(scores), -jnp.inf), axis=-1)


class MLP(nn.Module):
    """W2 relu(W1 x + b1) + b2, hidden width M."""

    hidden: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: BatchStates, train: bool) -> BatchStates:
        dense = lambda n, name: nn.Dense(n, kernel_init=INIT, dtype=self.dtype, name=name)
        out = dense(x.shape[-1], "down")(nn.relu(dense(self.hidden, "up")(x)))
        return nn.Dropout(self.dropout, deterministic=not train)(out)


class Block(nn.Module):
    """One transformer block; `parallel` adds attention and MLP side by side."""

    num_heads: int
    hidden: int
    dropout: float
    dtype: str
    parallel: bool

    @nn.compact
    def __call__(
        self, x: BatchStates, rows: Cache | None, position: jax.Array | None, train: bool
    ) -> tuple[BatchStates, Cache | None]:
        attention = Attention(self.num_heads, self.dropout, self.dtype, name="attention")
        mlp = MLP(self.hidden, self.dropout, self.dtype, name="mlp")
        norm1 = nn.LayerNorm(epsilon=EPSILON, name="norm1")
        norm2 = nn.LayerNorm(epsilon=EPSILON, name="norm2")
        update, rows = attention(norm1(x), rows, position, train)
        attended = x + update.astype(x.dtype)
        out = mlp(norm2(x if self.parallel else attended), train)
        return attended + out.astype(x.dtype), rows


class GPT(LanguageModel):
    """The three baselines.

    The fields are those of `config.model`; `shared` applies one block T times instead of T
    different blocks, `parallel` puts its attention and its MLP side by side.
    """

    shared: bool = False
    parallel: bool = False

    def setup_block(self) -> None:
        over_steps = nn.scan(
            Block if self.remat == "none" else nn.remat(Block, static_argnums=(4,)),
            variable_broadcast="params" if self.shared else False,
            variable_axes={} if self.shared else {"params": 0},
            split_rngs={"params": not self.shared, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.num_steps,
            unroll=self.scan_unroll,
        )
        hidden = self.mlp_ratio * self.embed_dim
        self.blocks = over_steps(self.num_heads, hidden, self.dropout, self.dtype, self.parallel)

    def states(self, x: BatchStates, train: bool) -> BatchStates:
        return self.blocks(x, None, None, train)[0]

    def cache_row(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the key and the value of a token, in one step."""
        return dict.fromkeys("kv", (self.num_heads, self.embed_dim // self.num_heads))

    def descend(
        self,
        x: BatchStates,
        cache: Cache,
        position: jax.Array | None,
        decoding: Decoding,
        active: jax.Array | None = None,
    ) -> tuple[BatchStates, Cache, jax.Array]:
        del active  # every token makes all steps
        if decoding != Decoding():
            raise ValueError("the transformer baselines have no energy: exact cache, all steps")
        x, rows = self.blocks(x, cache, position, False)
        assert rows is not None
        return x, rows, jnp.full(x.shape[:2], self.num_steps)
