"""`attention.attend` by the flash-attention kernels that GPUs (cuDNN) and TPUs (splash) have.

The gradient of the attention energy is attention whose values are its keys, so a kernel made for
transformers computes it, and its own backward pass gives the outer gradient: the keys get the sum
of what it finds for keys and for values. The kernels know the inclusive mask only; under the
strict one the queries move up by one row.

cuDNN takes bfloat16 and float16 and heads of at most 256 (128 before Hopper), splash attention
sequences that are multiples of 128; arrays of several devices are taken inside `shard_map` only
(see `split_heads`). `attend` is None for what they do not take. Both add up in an order of their
own: two runs on a GPU may differ in the last digits. They have no second derivative.
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
"""(queries, keys that are also the values) -> causal attention with scale one, head by head."""

SPLASH_LANES, SPLASH_WIDEST = 128, 256
SPLASH_BLOCKS = (512, 256, 128)


def attend(
    query: Float[Array, "G N E"],
    keys: Float[Array, "G H K E"],
    weight: Float[Array, "G H N"],
    strict: bool,
) -> Float[Array, "G N E"] | None:
    """`attention.attend` without dropout, or None where no kernel takes these arrays."""
    if not may_hold_kernels():
        return None
    heads = keys.shape[0] * keys.shape[1]
    kernel = kernel_for(_backend(), heads, *query.shape[1:], str(query.dtype))
    return None if kernel is None else attend_with(kernel, query, keys, weight, strict)


def _backend() -> str:
    """Of the devices of the `shard_map` around, which need not be those of this machine."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform == "cuda" else platform


def attend_with(kernel: Kernel, query, keys, weight, strict: bool) -> Float[Array, "G N E"]:
    """`attention.attend` by this kernel. Arguments are those of `attend`."""
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
    """The kernel of a backend (`cpu`, `gpu`, `tpu`) for (heads, length, width), if it has one."""
    if backend == "gpu" and _cudnn_takes(jax.ShapeDtypeStruct((heads, length, width), dtype)):
        return dot_product
    fits = length % SPLASH_LANES == 0 and width <= SPLASH_WIDEST
    return functools.partial(splash, interpret=False) if backend == "tpu" and fits else None


def dot_product(queries: Heads, keys: Heads, implementation="cudnn") -> Heads:
    """`jax.nn.dot_product_attention`."""
    order = lambda x: jnp.swapaxes(x, 0, 1)  # (N,F,E)
    k = order(keys)
    options = {"scale": 1.0, "is_causal": True, "implementation": implementation}
    return order(jax.nn.dot_product_attention(order(queries), k, k, **options))


def _cudnn_takes(shape: jax.ShapeDtypeStruct) -> bool:
    """Asks JAX, which knows what the installed cuDNN and the GPU can do."""
    loss = lambda q, k: jnp.sum(dot_product(q, k).astype(jnp.float32))
    try:
        jax.eval_shape(jax.grad(loss, (0, 1)), shape, shape)
    except RuntimeError:  # no cuDNN or an old one; NotImplementedError of the type or width
        return False
    return True


def splash(queries: Heads, keys: Heads, *, interpret: bool) -> Heads:
    """The splash attention of JAX's Pallas kernels for TPUs; `interpret` runs it anywhere."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    heads, length, _ = queries.shape
    size = next(block for block in SPLASH_BLOCKS if length % block == 0)
    sizes: Any = [size] * 8  # of queries, keys, keys at a time; the last five of the backward pass
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
# compiler cannot split a kernel of an accelerator, and moves whole scores between devices where it
# splits blocks of them; here each device attends with its own heads, and sums of states are all
# that is exchanged.


def axes_left() -> tuple[str, ...]:
    """The mesh axes of the `shard_map` around that are left to the compiler; outside, none."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    return tuple(free) if mesh.manual_axes else ()


def may_hold_kernels() -> bool:
    """Whether a kernel of an accelerator can stand here: on one device, or nothing is left."""
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    return not axes_left() if inside else jax.device_count() == 1


def split_heads(function: Callable, groups: int, heads: int) -> Callable:
    """A function of all heads, from the same function of the heads of each device.

    It is `function(query (G,N,E), keys (G,H,K,E), *others (G,H,...)) -> (G,N,E)`.
    With one group its heads are split, and what they give is summed up; else the groups are.

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
