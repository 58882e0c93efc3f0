"""Operations for energies and norms, with accelerator kernels where available.

Each is a plain function, with a custom derivative rule where that pays. `implementation` selects
one of three variants:

- `fused`: the custom rules, and an accelerator's attention kernel if there is one;
- `blocked`: the custom rules in plain `jax.numpy` everywhere, with sums always in the same order;
- `autodiff`: no custom rules, automatic differentiation only, with forward mode and any order.

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
