"""Shardings on a device mesh with the axes data, fsdp and tensor.

Batches are sharded over `data` and `fsdp`. Parameters and their optimizer state are sharded by the
axes of their specs: widths over `fsdp`; heads, hidden widths and the vocabulary over `tensor`. They
are replicated along `data`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nrgpt_jax.core.parameters import ParameterSpec, Sizes
from nrgpt_jax.errors import require

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
BATCH_AXES = (DATA, FSDP)  # rows of a batch are sharded over both
SPLIT_OVER: Mapping[str, str | None] = {
    **dict.fromkeys("HMV", TENSOR),
    "D": FSDP,
    **dict.fromkeys("YTNL"),
}
"""The mesh axis over which a parameter axis is sharded, by its letter; None: replicated."""

_FIELDS = {"D": "embed_dim", "H": "num_heads", "M": "mlp_ratio x embed_dim", "V": "vocab_size"}


def mesh_shape(mesh: Mapping[str, int] | ConfigDict, num_devices: int) -> tuple[int, int, int]:
    """Return the lengths of data, fsdp and tensor in `config.mesh`; one may be -1: the rest.

    Raises:
      UserError: a length is invalid, or the product is not the number of devices.
    """
    lengths = {axis: mesh[axis] for axis in AXES}
    for axis, length in lengths.items():
        require(length > 0 or length == -1, f"mesh.{axis}", length, "positive, or -1: the rest")
    free = [axis for axis, length in lengths.items() if length == -1]
    require(len(free) < 2, f"mesh.{free[-1] if free else DATA}", -1, "one axis at most is -1")
    known = math.prod(length for length in lengths.values() if length > 0)
    for axis in free:
        lengths[axis] = max(1, num_devices // known)
    shown = " x ".join(f"{axis} {length}" for axis, length in lengths.items())
    cure = f"there are {num_devices} devices; their product must be that (one may be -1: the rest)"
    require(math.prod(lengths.values()) == num_devices, "mesh", shown, cure)
    return lengths[DATA], lengths[FSDP], lengths[TENSOR]


def make_mesh(
    mesh: Mapping[str, int] | ConfigDict | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """Create the mesh of `config.mesh`; by default all devices are on `data`.

    Args:
      mesh: lengths by axis.
      devices: devices of the mesh; None: all devices of all processes.

    Raises:
      UserError: as in `mesh_shape`.
    """
    count = jax.device_count() if devices is None else len(devices)
    shape = mesh_shape(mesh or {DATA: -1, FSDP: 1, TENSOR: 1}, count)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def check_sizes(sizes: Sizes, mesh: Mapping[str, int]) -> None:
    """Raise UserError if the length of a parameter axis is not a multiple of its mesh axis."""
    for letter, field in _FIELDS.items():
        axis = SPLIT_OVER[letter]
        assert axis is not None
        length, parts = sizes.length(letter), mesh[axis]
        pad = f"; pad it: {-(-length // parts) * parts}" if letter == "V" else ""
        cure = f"it must be a multiple of mesh.{axis}={parts}{pad}"
        require(length % parts == 0, f"model.{field}", length, cure)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(batch_size: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Return the indices of the rows of a batch on devices of this process, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in indices.values()]))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Create global arrays from the `local_rows` of a batch (a tree of numpy arrays)."""

    def put(x: np.ndarray) -> jax.Array:
        size, indices = _placed(len(x), mesh)
        part = lambda index: x[indices[index[0].start or 0]]
        return jax.make_array_from_callback((size, *x.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(put, batch)


@functools.cache
def _placed(count: int, mesh: jax.sharding.Mesh) -> tuple[int, dict[int, np.ndarray]]:
    """Return the global batch size for `count` local rows, and the local rows of each shard.

    A shard is identified by its first row in the global batch.
    """
    parts = mesh.shape[DATA] * mesh.shape[FSDP]
    size = count * parts // len(local_rows(parts, mesh))
    rows, rows_per_part = local_rows(size, mesh), size // parts
    starts = range(0, size, rows_per_part)
    return size, {at: np.flatnonzero((rows >= at) & (rows < at + rows_per_part)) for at in starts}


def parameter_partition(spec: Any) -> PartitionSpec:
    """Return the partition of a parameter; axes that are not in `SPLIT_OVER` are not split.

    Raises:
      TypeError: it is not a `ParameterSpec`.
    """
    if not isinstance(spec, ParameterSpec):
        raise TypeError(f"a parameter is described by {spec!r}, not by a ParameterSpec with axes")
    free, mesh_axes = {FSDP, TENSOR}, []
    for letter in spec.axes:
        axis = SPLIT_OVER.get(letter)
        mesh_axes.append(axis if axis in free else None)
        free.discard(axis or "")  # a mesh axis splits one axis of an array
    return PartitionSpec(*mesh_axes)


def parameter_partitions(specs: Any) -> Any:
    """Return the partition of every parameter in a tree of specs."""
    return jax.tree.map(parameter_partition, specs, is_leaf=_is_spec)


def parameter_shardings(specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the sharding of every parameter in a tree of specs."""
    place = lambda spec: NamedSharding(mesh, parameter_partition(spec))
    return jax.tree.map(place, specs, is_leaf=_is_spec)


def only(partition: PartitionSpec, *axes: str) -> PartitionSpec:
    """Return the partition restricted to the given mesh axes."""
    return PartitionSpec(*(axis if axis in axes else None for axis in partition))


def on_one_device(tree: Any) -> Any:
    """Return the arrays unsharded, on one device of this process; every device must have room.

    All processes must call it together.
    """
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_replicated for leaf in leaves):
        tree = _repeated(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


@functools.cache
def _repeated(mesh: jax.sharding.Mesh):
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the shapes and dtypes of a tree of arrays, with the given shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParameterSpec)
