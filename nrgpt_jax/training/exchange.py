"""Collectives of a training step: one gather of parameters and one scatter of gradients.

Every device processes its own rows of a batch, with parameters gathered along `fsdp`. Since the
recurrent block is the same in every step, a weight is gathered once, outside the loops over
recurrent steps and over parts of a batch. Parameters stay sharded over `tensor`; the compiler
inserts the sums that this needs.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from nrgpt_jax.models.sharding import AXES, BATCH_AXES, DATA, FSDP, TENSOR, only


def over_rows(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Map a `function` of each device's rows to a function of all rows (`jax.shard_map`).

    Inside, the compiler partitions `tensor` alone, and only if the mesh splits it, because it
    cannot partition accelerator kernels.
    """
    axes = AXES if mesh.shape[TENSOR] == 1 else BATCH_AXES
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=set(axes),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # values differ between devices until they are summed
    )


def of_rows(partitions: Any) -> Any:
    """Return the partitions of parameters inside `over_rows`: those over `fsdp` alone."""
    return _map(lambda partition: only(partition, FSDP), partitions)


def gather(params: Any, partitions: Any, mesh: Mesh) -> Any:
    """Gather parameters along `fsdp`, inside `over_rows`."""
    if mesh.shape[FSDP] == 1:
        return params

    def of_one(partition: PartitionSpec, part: jax.Array) -> jax.Array:
        if FSDP not in partition:
            return part
        return jax.lax.all_gather(part, FSDP, axis=tuple(partition).index(FSDP), tiled=True)

    of_all = lambda params: _map(of_one, partitions, params)
    # Without the barrier, compilers may gather again in every recurrent step, to save memory.
    return jax.lax.optimization_barrier(_as_stored(of_all, partitions, mesh)(params))


def scatter(gradients: Any, partitions: Any, mesh: Mesh) -> Any:
    """Sum gradients over devices, each sharded like its parameter, inside `over_rows`."""

    def of_one(partition: PartitionSpec, gradient: jax.Array) -> jax.Array:
        if mesh.shape[FSDP] == 1 or FSDP not in partition:
            return jax.lax.psum(gradient, BATCH_AXES)
        axis = tuple(partition).index(FSDP)
        part = jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(part, DATA)

    of_all = lambda gradients: _map(of_one, partitions, gradients)
    return _as_stored(of_all, partitions, mesh)(gradients)


def _as_stored(function: Callable, partitions: Any, mesh: Mesh) -> Callable:
    """Apply `function` to each device's `tensor` shard, which the compiler would gather first."""
    if mesh.shape[TENSOR] == 1:
        return function
    parts = _map(lambda partition: only(partition, TENSOR), partitions)
    return jax.shard_map(
        function, axis_names={TENSOR}, in_specs=(parts,), out_specs=parts, check_vma=False
    )


def _map(function: Callable, partitions: Any, *trees: Any) -> Any:
    is_partition = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(function, partitions, *trees, is_leaf=is_partition)
