"""The device mesh, its axis names, and the shardings of what lives on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nfnet_flax.config import require

DATA_AXIS = "data"
"""Mesh axis over which the rows of a batch are divided, together with `fsdp`."""
FSDP_AXIS = "fsdp"
"""Mesh axis over which kernels, their momentum and their EMA are divided, too. Neighbouring devices lie along it."""
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
"""In the order of devices: row r of a batch of B rows lies on device `r * num_devices // B`."""


def make_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """Devices along `data` and `fsdp`; by default all of all processes, in process order (the input relies on it).

    Raises:
      ConfigError: `fsdp` does not divide the number of devices.
    """
    chosen = jax.devices() if devices is None else list(devices)
    require(len(chosen) % fsdp == 0, "execution.fsdp", fsdp, f"must divide the {len(chosen)} devices of this run")
    return Mesh(np.asarray(chosen).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def sharded_axis(name: str, shape: tuple[int, ...], mesh: Mesh) -> int | None:
    """The axis of a parameter (or of its momentum, or its EMA) that is divided over `fsdp`, or None.

    Kernels are divided along their output channels, the last axis: so no sum of the standardization or of gradient
    clipping crosses a device. All else stays whole, and kernels whose output channels cannot be divided evenly.
    """
    devices = mesh.shape[FSDP_AXIS]
    return len(shape) - 1 if devices > 1 and name.endswith(".kernel") and shape[-1] % devices == 0 else None


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter, its momentum or its EMA lies on the mesh."""
    axis = sharded_axis(name, shape, mesh)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP_AXIS)


def check_batch_size(field: str, batch_size: int, mesh: Mesh, num_microbatches: int | None = None) -> None:
    """Raises `ConfigError` unless a batch consists of equally many equal parts on every device.

    Args:
      field: names the batch size in the message.
      batch_size: rows of the global batch.
      mesh: that it is divided over.
      num_microbatches: parts of the batch; None: one for each device.
    """
    require(batch_size % mesh.size == 0, field, batch_size, f"must be divisible by the {mesh.size} devices of this run")
    if num_microbatches is not None:
        require(
            num_microbatches % mesh.size == 0,
            "execution.num_microbatches",
            num_microbatches,
            f"must be a multiple of the {mesh.size} devices of this run",
        )
        remedy = f"must be divisible by execution.num_microbatches = {num_microbatches}"
        require(batch_size % num_microbatches == 0, field, batch_size, remedy)


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """This process's rows of a global batch as global arrays on the devices."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
