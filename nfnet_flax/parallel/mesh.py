"""The device mesh, its axis names, and the shardings of what lives on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nfnet_flax.config import require

DATA_AXIS = "data"
"""Mesh axis over which the rows of a batch are divided."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices along the data axis; by default all of all processes, in process order (the input relies on it)."""
    chosen = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(chosen), (DATA_AXIS,), axis_types=(AxisType.Auto,))


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


def check_microbatches(num_microbatches: int | None, batch_size: int, mesh: Mesh) -> None:
    """Raises `ConfigError` unless every device has equally many equal parts of the batch."""
    if num_microbatches is not None:
        devices = mesh.shape[DATA_AXIS]
        require(
            num_microbatches % devices == 0 and batch_size % num_microbatches == 0,
            "execution.num_microbatches",
            num_microbatches,
            f"must be a multiple of the {devices} devices of this run and divide the batch of {batch_size}",
        )


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """This process's rows of a global batch as global arrays on the devices."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
