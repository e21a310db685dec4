"""The device mesh, its axis names, and the shardings of what lives on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nfnet_flax.config import require

DATA_AXIS = "data"
"""Mesh axis over which the rows of a batch are divided."""


def make_mesh() -> Mesh:
    """All devices of all processes along the data axis, in process order (the input pipeline relies on it)."""
    return Mesh(np.asarray(jax.devices()), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows divided over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Raises `ConfigError` if the rows of a batch cannot be divided evenly over the data axis."""
    devices = mesh.shape[DATA_AXIS]
    require(batch_size % devices == 0, field, batch_size, f"must be divisible by the {devices} devices of this run")


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """This process's rows of a global batch as global arrays on the devices."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
