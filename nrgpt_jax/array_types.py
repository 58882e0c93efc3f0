"""Array type aliases, and the letters of every shape in this code base.

Shape letters (as suffixes, `g_BxNxD`, and in annotations):

    B batch              N tokens (context length)   D embedding width
    H heads              Y head rank (head width)    M feed-forward hidden width
    T recurrent steps    V vocabulary                K context tokens (keys)
    L distinct blocks    S slots of a cache          P tokens that are read at once
    G, E of ops: groups of heads that share queries, width of a score
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jaxtyping
import numpy as np
from jaxtyping import Array, Float, Int

Params: TypeAlias = Mapping[str, jax.Array]
"""The parameters of one energy, norm or rate, by name."""

Variables: TypeAlias = Mapping[str, Any]
"""What `model.init` returns and `model.apply` takes: `{"params": ...}`."""

Key: TypeAlias = jax.Array
"""A `jax.random.key`."""

RowKeys: TypeAlias = jaxtyping.Key[Array, "B"]
"""A `jax.random.key` for every sequence, of dropout."""

StepKeys: TypeAlias = jaxtyping.Key[Array, "T B"]
"""The same, for every step."""

BatchStates: TypeAlias = Float[Array, "B N D"]
BatchEnergies: TypeAlias = Float[Array, "B N"]
Tokens: TypeAlias = Int[Array | np.ndarray, "B N"]
PerSequence: TypeAlias = Int[Array | np.ndarray, "B"]
Logits: TypeAlias = Float[Array, "B N V"]


class Batch(NamedTuple):
    """Inputs and the tokens that follow them; weight 0 marks what is not to be predicted."""

    inputs: Any  # (B,N) int32, numpy or JAX arrays
    targets: Any  # (B,N) int32
    weights: Any  # (B,N) float32
