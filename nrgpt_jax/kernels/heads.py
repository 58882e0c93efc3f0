"""Attention with heads that are split over devices.

Inside a `shard_map` over the rows of a batch, heads may still be split over other mesh axes. The
compiler cannot split a kernel of an accelerator, and moves whole scores between devices where it
splits blocks of them; here each device attends with its own heads, and sums of states are all
that is exchanged.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P


def axes_left() -> tuple[str, ...]:
    """The mesh axes of the `shard_map` around that are left to the compiler; outside, none."""
    mesh = jax.sharding.get_abstract_mesh()
    free = (axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
    return tuple(free) if mesh.manual_axes else ()


def may_hold_kernels() -> bool:
    """Whether a kernel of an accelerator can stand here: on one device, or nothing is left."""
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    return not axes_left() if inside else jax.device_count() == 1


def split_heads(function: Callable, groups: int, heads: int) -> Callable:
    """`function(query (G,N,E), keys (G,H,K,E), *others (G,H,...)) -> (G,N,E)` of all heads, from
    the same function of the heads of each device.

    With one group its heads are split, and what they give is summed up; else the groups are.

    Args:
      function: a sum over the heads of each group.
      groups, heads: G and H of all devices together.
    """
    axes = axes_left()
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    if not axes or (groups if groups > 1 else heads) % parts != 0:
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
