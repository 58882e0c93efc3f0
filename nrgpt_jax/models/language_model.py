"""What every model here shares: embeddings in front, final LayerNorm and head behind."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from nrgpt_jax.array_types import Logits, Tokens, at_least_float32
from nrgpt_jax.core.norms import EPSILON
from nrgpt_jax.core.parameters import INIT_STD

INIT = nn.initializers.normal(INIT_STD)

BatchStates = Float[Array, "B N D"]


class LanguageModel(nn.Module):
    """Token and position embedding -> `states` (of a subclass) -> LayerNorm -> logits.

    Subclasses define `setup_block` (their submodules) and `states` (B,N,D) -> (B,N,D).
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
