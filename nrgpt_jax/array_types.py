"""Array type aliases, and the letters of all shapes in this code base.

Shape letters (in suffixes such as `g_BxNxD`, and in annotations):

    B batch              N tokens (context length)   D embedding width
    H heads              Y head rank (head width)    M feed-forward hidden width
    T recurrent steps    V vocabulary                K context tokens (keys)
    L distinct blocks    S slots of a cache          P tokens read at once
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
"""The variables of a Flax model, `{"params": ...}`: from `model.init`, for `model.apply`."""

Key: TypeAlias = jax.Array
"""A `jax.random.key`."""

RowKeys: TypeAlias = jaxtyping.Key[Array, "B"]
"""Dropout keys, one `jax.random.key` per sequence."""

StepKeys: TypeAlias = jaxtyping.Key[Array, "T B"]
"""Dropout keys, one per recurrent step and sequence."""

BatchStates: TypeAlias = Float[Array, "B N D"]
BatchEnergies: TypeAlias = Float[Array, "B N"]
Tokens: TypeAlias = Int[Array | np.ndarray, "B N"]
PerSequence: TypeAlias = Int[Array | np.ndarray, "B"]
Logits: TypeAlias = Float[Array, "B N V"]


class Batch(NamedTuple):
    """Input tokens, target tokens, and the weights of the targets in the loss; 0 ignores one."""

    inputs: Any  # (B,N) int32, numpy or JAX arrays
    targets: Any  # (B,N) int32
    weights: Any  # (B,N) float32
