"""`attention.attend` by flash-attention kernels: cuDNN on GPUs, splash attention on TPUs.

The gradient of the attention energy is attention whose values are its keys, so kernels for
transformers compute it. Their backward pass gives the outer gradient: that of the keys is the sum
of the kernel's gradients in keys and values. The kernels support the inclusive mask only; for the
strict mask the queries are shifted up by one row.

cuDNN takes bfloat16 and float16, and heads of width at most 256 (128 before Hopper); splash
attention takes sequence lengths that are multiples of 128. Arrays on several devices are supported
inside `shard_map` only (see `split_heads`). `attend` returns None for unsupported arrays. Both
kernels sum in their own order: two runs on a GPU may differ in the last digits. They have no second
derivative.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

Heads = Float[Array, "F N E"]
Kernel = Callable[[Heads, Heads], Heads]
"""A map from queries, and keys that are also the values, to causal attention with scale one."""

SPLASH_LANES, SPLASH_WIDEST = 128, 256
SPLASH_BLOCKS = (512, 256, 128)


def attend(
    query: Float[Array, "G N E"],
    keys: Float[Array, "G H K E"],
    weight: Float[Array, "G H N"],
    strict: bool,
) -> Float[Array, "G N E"] | None:
    """Compute `attention.attend` without dropout; None if no kernel supports these arrays."""
    if not may_hold_kernels():
        return None
    heads = keys.shape[0] * keys.shape[1]
    kernel = kernel_for(_backend(), heads, *query.shape[1:], str(query.dtype))
    return None if kernel is None else attend_with(kernel, query, keys, weight, strict)


def _backend() -> str:
    """Return the backend of the enclosing `shard_map`, which may not be that of this host."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform == "cuda" else platform


def attend_with(kernel: Kernel, query, keys, weight, strict: bool) -> Float[Array, "G N E"]:
    """Compute `attention.attend` with this kernel; arguments as in `attend`."""
    if strict:  # row A holds query A+1, whose context ends with token A; the last row is dropped
        query = jnp.roll(query, -1, axis=1)
    queries = jnp.broadcast_to(query[:, None], keys.shape)
    heads = lambda x: x.reshape(-1, *x.shape[2:])
    out = kernel(heads(queries), heads(keys)).reshape(keys.shape)
    if strict:
        out = jnp.concatenate([jnp.zeros_like(out[:, :, :1]), out[:, :, :-1]], axis=2)
    return jnp.sum(weight[..., None] * out.astype(weight.dtype), axis=1).astype(query.dtype)


@functools.cache
def kernel_for(backend: str, heads: int, length: int, width: int, dtype: str) -> Kernel | None:
    """Return the kernel of a backend (`cpu`, `gpu`, `tpu`) for (heads, length, width), or None."""
    if backend == "gpu" and _cudnn_takes(jax.ShapeDtypeStruct((heads, length, width), dtype)):
        return dot_product
    fits = length % SPLASH_LANES == 0 and width <= SPLASH_WIDEST
    return functools.partial(splash, interpret=False) if backend == "tpu" and fits else None


def dot_product(queries: Heads, keys: Heads, implementation="cudnn") -> Heads:
    """Compute causal attention by `jax.nn.dot_product_attention`."""
    order = lambda x: jnp.swapaxes(x, 0, 1)  # (N,F,E)
    k = order(keys)
    options = {"scale": 1.0, "is_causal": True, "implementation": implementation}
    return order(jax.nn.dot_product_attention(order(queries), k, k, **options))


def _cudnn_takes(shape: jax.ShapeDtypeStruct) -> bool:
    """Whether cuDNN supports this shape; JAX knows the limits of the installed cuDNN and GPU."""
    loss = lambda q, k: jnp.sum(dot_product(q, k).astype(jnp.float32))
    try:
        jax.eval_shape(jax.grad(loss, (0, 1)), shape, shape)
    except RuntimeError:  # no cuDNN or an old one; NotImplementedError for the dtype or width
        return False
    return True


def splash(queries: Heads, keys: Heads, *, interpret: bool) -> Heads:
    """Compute splash attention by JAX's Pallas TPU kernels; `interpret` runs them anywhere."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    heads, length, _ = queries.shape
    size = next(block for block in SPLASH_BLOCKS if length % block == 0)
    sizes: Any = [size] * 8  # of queries, keys, keys per compute; the last five: backward pass
    mask = splash_attention.CausalMask((length, length))
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(*sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )(queries, keys, keys)


# Heads split over devices -------------------------------------------------------------------------

# Inside a `shard_map` over the rows of a batch, heads may still be split over other mesh axes. The
# compiler cannot shard an accelerator kernel, and moves whole scores between devices if it shards
# blocks of them. Here each device attends with its own heads, exchanging only sums of states.


def axes_left() -> tuple[str, ...]:
    """Return the mesh axes that the enclosing `shard_map` leaves to the compiler; outside, none."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    return tuple(free) if mesh.manual_axes else ()


def may_hold_kernels() -> bool:
    """Whether a kernel can run here: on one device, or in a `shard_map` without axes left."""
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    return not axes_left() if inside else jax.device_count() == 1


def split_heads(function: Callable, groups: int, heads: int) -> Callable:
    """Extend a function of the heads of one device to the heads of all devices.

    It is `function(query (G,N,E), keys (G,H,K,E), *others (G,H,...)) -> (G,N,E)`. A single group is
    sharded by heads, and the results are summed; several groups are sharded by group.

    Args:
      function: a sum over the heads of each group.
      groups, heads: G and H of all devices together.
    """
    axes = axes_left()
    if not axes:
        return function
    parts = math.prod([jax.sharding.get_abstract_mesh().shape[axis] for axis in axes])
    if (groups if groups > 1 else heads) % parts != 0:
        return function
    if groups > 1:
        query, of_heads, local = P(axes), P(axes), function
    else:
        query, of_heads = P(), P(None, axes)
        local = lambda *arguments: jax.lax.psum(function(*arguments), axes)

    def of_all(query_, *others):
        return jax.shard_map(
            local,
            axis_names=set(axes),
            in_specs=(query, *[of_heads] * len(others)),
            out_specs=query,
            check_vma=False,
        )(query_, *others)

    return of_all
