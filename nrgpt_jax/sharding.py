"""Where arrays live: batches are split over all devices, the training state is on each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh() -> jax.sharding.Mesh:
    """One axis, `data`, over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Global arrays of this process's part of a batch (a tree of numpy arrays)."""
    sharding = batch_sharding(mesh)
    put = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))
    return jax.tree.map(put, batch)


def abstract_replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes and types of a tree of arrays that is to live on every device."""
    where = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
