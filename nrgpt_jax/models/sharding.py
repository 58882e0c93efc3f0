"""Where arrays live on a mesh of devices with the axes data, fsdp and tensor.

Batches are split over `data` and `fsdp`. Parameters, and what an optimizer keeps of them, are split
by the axes that they carry: widths over `fsdp`, heads, hidden widths and the vocabulary over
`tensor`; along `data` everything is repeated.
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
BATCH_AXES = (DATA, FSDP)  # rows of a batch are split over both
SPLIT_OVER: Mapping[str, str | None] = {
    **dict.fromkeys("HMV", TENSOR),
    "D": FSDP,
    **dict.fromkeys("YTNL"),
}
"""The mesh axis that an axis of a parameter is split over, by its letter; None: none."""

_FIELDS = {"D": "embed_dim", "H": "num_heads", "M": "mlp_ratio x embed_dim", "V": "vocab_size"}


def mesh_shape(mesh: Mapping[str, int] | ConfigDict, num_devices: int) -> tuple[int, int, int]:
    """The lengths of data, fsdp and tensor, of `config.mesh`; one may be -1: the rest.

    Raises:
      UserError: they do not multiply to the number of devices.
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
    """The mesh of `config.mesh`; without it all devices are `data`.

    Args:
      mesh: lengths by axis.
      devices: all devices of all processes if None.

    Raises:
      UserError: as `mesh_shape`.
    """
    count = jax.device_count() if devices is None else len(devices)
    shape = mesh_shape(mesh or {DATA: -1, FSDP: 1, TENSOR: 1}, count)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def check_sizes(sizes: Sizes, mesh: Mapping[str, int]) -> None:
    """Raises UserError where an axis of the parameters cannot be split over that of the mesh."""
    for letter, field in _FIELDS.items():
        axis = SPLIT_OVER[letter]
        assert axis is not None
        length, parts = sizes.length(letter), mesh[axis]
        pad = f"; pad it: {-(-length // parts) * parts}" if letter == "V" else ""
        cure = f"it must be a multiple of mesh.{axis}={parts}{pad}"
        require(length % parts == 0, f"model.{field}", length, cure)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(batch_size: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """The numbers of the rows of a batch that devices of this process hold, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in indices.values()]))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Global arrays from the `local_rows` of a batch (a tree of numpy arrays)."""

    def put(x: np.ndarray) -> jax.Array:
        size, indices = _placed(len(x), mesh)
        part = lambda index: x[indices[index[0].start or 0]]
        return jax.make_array_from_callback((size, *x.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(put, batch)


@functools.cache
def _placed(count: int, mesh: jax.sharding.Mesh) -> tuple[int, dict[int, np.ndarray]]:
    """The rows of the whole batch for `count` local ones, and the local rows of a device's part.

    The part is named by the row of the whole batch at which it begins.
    """
    parts = mesh.shape[DATA] * mesh.shape[FSDP]
    size = count * parts // len(local_rows(parts, mesh))
    rows, rows_per_part = local_rows(size, mesh), size // parts
    starts = range(0, size, rows_per_part)
    return size, {at: np.flatnonzero((rows >= at) & (rows < at + rows_per_part)) for at in starts}


def parameter_partition(spec: Any) -> PartitionSpec:
    """How a parameter is split; axes that `SPLIT_OVER` does not know are not.

    Raises:
      TypeError: it carries no axes.
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
    """The partition of every parameter of a tree of specs."""
    return jax.tree.map(parameter_partition, specs, is_leaf=_is_spec)


def parameter_shardings(specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """A sharding for every parameter of a tree of specs."""
    place = lambda spec: NamedSharding(mesh, parameter_partition(spec))
    return jax.tree.map(place, specs, is_leaf=_is_spec)


def only(partition: PartitionSpec, *axes: str) -> PartitionSpec:
    """The partition restricted to the given mesh axes."""
    return PartitionSpec(*(axis if axis in axes else None for axis in partition))


def on_one_device(tree: Any) -> Any:
    """The same arrays, whole, of one device of this process; every device has room for them.

    All processes call it together.
    """
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_replicated for leaf in leaves):
        tree = _repeated(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


@functools.cache
def _repeated(mesh: jax.sharding.Mesh):
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and types of a tree of arrays that is to live where a tree of shardings says."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParameterSpec)
