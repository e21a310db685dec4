"""The device mesh, its axis names, and the shardings of what lives on it."""

import math
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
"""In the order of devices: row r of a batch of B rows lies on shard `r * num_batch_shards // B`."""
SPATIAL_AXIS = "spatial"
"""Mesh axis over which the height of the images is divided; only of a mesh that divides it. The nearest neighbours."""


def make_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1, spatial: int = 1) -> Mesh:
    """Devices along `data`, `fsdp` and, where it divides anything, `spatial`.

    Args:
      devices: by default all of all processes, in process order (the input relies on it).
      fsdp: devices along `fsdp`.
      spatial: devices along `spatial`.

    Raises:
      ConfigError: `fsdp` or `spatial` does not divide the number of devices, or an image's parts would lie in several
        processes.
    """
    chosen = jax.devices() if devices is None else list(devices)
    require(len(chosen) % spatial == 0, "execution.spatial", spatial, f"must divide the {len(chosen)} devices")
    owners = [{device.process_index for device in chosen[i : i + spatial]} for i in range(0, len(chosen), spatial)]
    require(all(len(group) == 1 for group in owners), "execution.spatial", spatial, "must divide a process's devices")
    remedy = f"must divide the {len(chosen)} devices of this run" + (
        f" over spatial = {spatial}" if spatial > 1 else ""
    )
    require(len(chosen) // spatial % fsdp == 0, "execution.fsdp", fsdp, remedy)
    if spatial == 1:
        return Mesh(np.asarray(chosen).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    axes = (*BATCH_AXES, SPATIAL_AXIS)
    return Mesh(np.asarray(chosen).reshape(-1, fsdp, spatial), axes, axis_types=(AxisType.Auto,) * 3)


def batch_shape(mesh: Mesh) -> dict[str, int]:
    """Number of shards along each axis that rows are divided over."""
    return {name: mesh.shape[name] for name in BATCH_AXES}


def num_batch_shards(mesh: Mesh) -> int:
    """Parts into which rows are divided: the number of devices, or of groups of them that share images."""
    return math.prod(batch_shape(mesh).values())


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, num_dims: int = 1) -> NamedSharding:
    """Rows divided over all devices; of images, which have four dimensions, also the height where the mesh says so."""
    is_divided = num_dims == 4 and SPATIAL_AXIS in mesh.shape
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, SPATIAL_AXIS) if is_divided else PartitionSpec(BATCH_AXES))


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
    shards = num_batch_shards(mesh)
    named = f"{shards} devices" if shards == mesh.size else f"{shards} groups of {mesh.size // shards} devices"
    require(batch_size % shards == 0, field, batch_size, f"must be divisible by the {named} of this run")
    if num_microbatches is not None:
        remedy = f"must be a multiple of the {named} of this run"
        require(num_microbatches % shards == 0, "execution.num_microbatches", num_microbatches, remedy)
        remedy = f"must be divisible by execution.num_microbatches = {num_microbatches}"
        require(batch_size % num_microbatches == 0, field, batch_size, remedy)


def check_image_size(field: str, image_size: int, mesh: Mesh) -> None:
    """Raises `ConfigError` unless images of `image_size` rows of pixels can be divided over `spatial`."""
    parts = mesh.shape.get(SPATIAL_AXIS, 1)
    require(image_size % parts == 0, field, image_size, f"must be divisible by execution.spatial = {parts}")


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a global batch as global arrays on the devices."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)
        for name, rows in batch.items()
    }
