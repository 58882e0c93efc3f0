"""Operations that energies and norms are written with, and what accelerators have for them.

Each is a plain function, with a derivative rule of its own where that pays. `implementation` is
the one switch:

- `fused`: these rules, and for attention a kernel of the accelerator where it has one;
- `blocked`: the rules in plain `jax.numpy` everywhere, with the same sums in the same order each
  time;
- `autodiff`: no rules: automatic differentiation alone, which has forward mode and any order.

All three agree in values, first and second derivatives.
"""

from nrgpt_jax.ops.attention import causal_mask, log_sum_exp
from nrgpt_jax.ops.dense import (
    IMPLEMENTATIONS,
    accumulator_type,
    along_last_axis,
    at_least_float32,
    dot,
    gelu,
    implementation,
    linear,
    linear_transpose,
    rotate,
    standardize,
)

__all__ = [
    "IMPLEMENTATIONS",
    "accumulator_type",
    "along_last_axis",
    "at_least_float32",
    "causal_mask",
    "dot",
    "gelu",
    "implementation",
    "linear",
    "linear_transpose",
    "log_sum_exp",
    "rotate",
    "standardize",
]
