"""Where arrays live: batches are split over the data axis, parameters by the axes they carry."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nrgpt_jax.core.parameters import ParameterSpec

DATA_AXIS = "data"
SPLIT_OVER: Mapping[str, str] = {"H": "tensor", "M": "tensor", "V": "tensor", "D": "fsdp"}
"""The mesh axis that an axis of a parameter is split over, by its letter; absent: whole."""


def make_mesh() -> jax.sharding.Mesh:
    """One axis, `data`, over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def parameter_partition(spec: ParameterSpec, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """How a parameter is split over a mesh; an axis that the mesh lacks splits nothing."""
    free, found = set(mesh.axis_names), []
    for letter in spec.axes:
        axis = SPLIT_OVER.get(letter)
        found.append(axis if axis in free else None)
        free.discard(axis)  # a mesh axis splits one axis of an array
    return PartitionSpec(*found)


def parameter_shardings(specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """A sharding for every parameter of a tree of specs."""
    place = lambda spec: NamedSharding(mesh, parameter_partition(spec, mesh))
    return jax.tree.map(place, specs, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Global arrays of this process's part of a batch (a tree of numpy arrays)."""
    sharding = batch_sharding(mesh)
    put = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))
    return jax.tree.map(put, batch)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and types of a tree of arrays that is to live where a tree of shardings says."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )
