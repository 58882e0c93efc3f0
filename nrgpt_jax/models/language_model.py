"""What every model here shares: embeddings in front, final LayerNorm and head behind."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from nrgpt_jax.array_types import Logits, Tokens, at_least_float32
from nrgpt_jax.core.descent import Decoding
from nrgpt_jax.core.norms import EPSILON
from nrgpt_jax.core.parameters import INIT_STD

INIT = nn.initializers.normal(INIT_STD)

BatchStates = Float[Array, "B N D"]
Cache = dict[str, jax.Array]
"""What is kept of past tokens, (T,B,S,...) by name; see `core.memory`."""


class LanguageModel(nn.Module):
    """Token and position embedding -> `states` (of a subclass) -> LayerNorm -> logits.

    Subclasses define `setup_block` (their submodules), `states` (B,N,D) -> (B,N,D), and for the
    making of text `cache_row` and `descend`.
    Residual states, the norms and the logits are kept in float32 whatever `dtype` is.
    """

    vocab_size: int
    context_length: int
    embed_dim: int
    num_heads: int
    num_steps: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    tied_head: bool = False
    dtype: str = "float32"
    scan_unroll: int = 1
    remat: str = "none"

    def setup(self):
        embed = lambda rows: nn.Embed(rows, self.embed_dim, embedding_init=INIT)
        self.token_embedding = embed(self.vocab_size)
        self.position_embedding = embed(self.context_length)
        self.final_norm = nn.LayerNorm(epsilon=EPSILON)
        if not self.tied_head:
            self.head = nn.Dense(self.vocab_size, kernel_init=INIT, dtype=self.dtype)
        self.setup_block()

    def setup_block(self) -> None:
        """Declares the submodules of the recurrent block."""
        raise TypeError(f"{type(self).__name__} does not define setup_block")

    def states(self, x: BatchStates, train: bool) -> BatchStates:
        """The states after the last step."""
        raise TypeError(f"{type(self).__name__} does not define states")

    def cache_row(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what is kept of one token, of one step."""
        raise TypeError(f"{type(self).__name__} does not define cache_row")

    def descend(
        self,
        x: BatchStates,
        cache: Cache,
        position: jax.Array | None,
        decoding: Decoding,
        active: Bool[Array, "B P"] | None = None,
    ) -> tuple[BatchStates, Cache, Int[Array, "B P"]]:
        """`states` of P tokens a sequence, with past tokens in a cache.

        Args:
          x: (B,P,D).
          cache: is written, and read where `position` is given.
          position: None: the tokens are the first P. (B,): P = 1, one token at its position.
          decoding: which cache, and when a token stops.
          active: tokens that are waited for; None: all.

        Returns:
          The states after the last step, the cache, and the number of steps of every token.
        """
        raise TypeError(f"{type(self).__name__} does not define descend")

    def empty_cache(self, batch: int, slots: int, kind: str = "exact") -> Cache:
        """A cache for `slots` tokens of `batch` sequences, of a kind of `descent.CACHES`."""
        steps = 1 if kind == "fixed_point" else self.num_steps
        shape = lambda row: (steps, batch, slots, *row)
        return {name: jnp.zeros(shape(row), self.dtype) for name, row in self.cache_row().items()}

    def prefill(
        self, tokens: Tokens, lengths: Int[Array, "B"], cache: Cache, decoding: Decoding
    ) -> tuple[Float[Array, "B V"], Cache, Int[Array, "B P"]]:
        """Reads prompts (B,P), each `lengths` long, into a cache.

        Returns:
          The logits after the last token of each, the cache, the steps that tokens made.
        """
        active = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        x, cache, steps = self.descend(self.embed(tokens), cache, None, decoding, active)
        last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
        return self.readout(last)[:, 0], cache, steps

    def decode(
        self,
        tokens: Int[Array, "B"],
        position: Int[Array, "B"],
        cache: Cache,
        decoding: Decoding,
        active: Bool[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache, Int[Array, "B"]]:
        """One more token in each sequence, at `position`: logits (B,V), the cache, the steps."""
        x = self.token_embedding(tokens) + self.position_embedding(position)
        waited_for = None if active is None else active[:, None]
        x, cache, steps = self.descend(x[:, None], cache, position, decoding, waited_for)
        return self.readout(x)[:, 0], cache, steps[:, 0]

    def embed(self, tokens: Tokens) -> BatchStates:
        """The states before the first step. Raises ValueError on too long a sequence."""
        if tokens.shape[-1] > self.context_length:
            raise ValueError(
                f"{tokens.shape[-1]} tokens do not fit the context length {self.context_length}"
            )
        positions = jnp.arange(tokens.shape[-1])
        return self.token_embedding(tokens) + self.position_embedding(positions)[None]

    def readout(self, x: BatchStates) -> Logits:
        """Logits (float32) of states; works on the states of any step."""
        x = self.final_norm(x)
        if self.tied_head:
            logits = x.astype(self.dtype) @ self.token_embedding.embedding.T.astype(self.dtype)
        else:
            logits = self.head(x)
        return at_least_float32(logits)

    def __call__(self, tokens: Tokens, train: bool = False) -> Logits:
        """Next-token logits (B,N,V) of tokens (B,N), N up to the context length.

        Args:
          tokens: integers below `vocab_size`.
          train: apply dropout; needs `rngs={"dropout": key}` when the rate is positive.
        """
        return self.readout(self.states(self.embed(tokens), train))
