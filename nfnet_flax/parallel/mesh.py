"""The device mesh, its axis names, and the shardings of batches and parameters."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nfnet_flax.config import require

DATA_AXIS = "data"
"""Mesh axis over which the rows of a batch are divided, together with `fsdp`."""
FSDP_AXIS = "fsdp"
"""Mesh axis of neighbouring devices, over which rows and the state are divided."""
MAX_SHARES = 16
"""Largest number of shares of the state. A smaller share would be less than a tile of a TPU's memory, so that the
compiler would send whole arrays."""
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
"""In the order of devices: row r of a batch of B rows lies on shard `r * num_batch_shards // B`."""
SPATIAL_AXIS = "spatial"
"""Mesh axis over which the height of the images is divided; a mesh has it only if the height is divided. Its devices
are the nearest neighbours."""


class LayoutProblem(NamedTuple):
    """A reason why devices, batches and images do not fit together."""

    field: str
    """Name of the recipe's field, or "devices"."""
    value: object
    """Value of the field."""
    remedy: str
    """What to change."""


def layout_problems(
    processes: Sequence[int],
    *,
    fsdp: int,
    spatial: int,
    num_microbatches: int | None = None,
    batch_sizes: Mapping[str, int] = MappingProxyType({}),
    image_sizes: Mapping[str, int] = MappingProxyType({}),
    platform: str | None = None,
) -> list[LayoutProblem]:
    """The reasons why a recipe cannot run on given devices; empty if it can. No device is needed for this.

    Args:
      processes: for each device, in the order of the mesh, the index of the process that owns it.
      fsdp: number of devices along `fsdp`.
      spatial: number of devices along `spatial`.
      num_microbatches: number of parts of a batch; None: one for each shard of the mesh.
      batch_sizes: name of a field -> number of rows of a global batch.
      image_sizes: name of a field -> height of images in pixels.
      platform: platform of the devices ("cpu", "gpu" or "tpu"); None: not known.
    """
    found = _device_problems(processes, fsdp=fsdp, spatial=spatial)
    if spatial > 1 and platform == "gpu":
        remedy = (
            "must be 1 on GPUs, where the compiler gathers the activations of grouped convolutions, so that a device "
            "computes the whole height; to save memory give execution.rematerialization = blocks, or more "
            "execution.num_microbatches"
        )
        found.insert(0, LayoutProblem("execution.spatial", spatial, remedy))
    for field, size in image_sizes.items():
        if size % spatial != 0:
            found.append(LayoutProblem(field, size, f"must be divisible by execution.spatial = {spatial}"))
    if len(processes) % spatial != 0:
        return found  # the number of shards is unknown
    shards = len(processes) // spatial
    named = f"{shards} devices" if spatial == 1 else f"{shards} groups of {spatial} devices"
    if num_microbatches is not None and num_microbatches % shards != 0:
        remedy = f"must be a multiple of the {named} of this run"
        found.append(LayoutProblem("execution.num_microbatches", num_microbatches, remedy))
    for field, size in batch_sizes.items():
        if size % shards != 0:
            found.append(LayoutProblem(field, size, f"must be divisible by the {named} of this run"))
        elif num_microbatches is not None and size % num_microbatches != 0:
            remedy = f"must be divisible by execution.num_microbatches = {num_microbatches}"
            found.append(LayoutProblem(field, size, remedy))
    return found


def _device_problems(processes: Sequence[int], *, fsdp: int, spatial: int) -> list[LayoutProblem]:
    found = []
    counts = Counter(processes)
    if len(set(counts.values())) > 1:
        remedy = "every process must have the same number of devices; shown is the number for each process"
        found.append(LayoutProblem("devices", dict(sorted(counts.items())), remedy))
    for before, after in itertools.pairwise(processes):
        if after < before:
            remedy = "must be ordered by process, as the rows of a batch are"
            found.append(LayoutProblem("devices", f"one of process {after} after one of process {before}", remedy))
            break
    if len(processes) % spatial != 0:
        remedy = f"must divide the {len(processes)} devices of this run"
        return [*found, LayoutProblem("execution.spatial", spatial, remedy)]
    if any(len(set(processes[first : first + spatial])) > 1 for first in range(0, len(processes), spatial)):
        found.append(LayoutProblem("execution.spatial", spatial, "must divide the number of a process's devices"))
    if len(processes) // spatial % fsdp != 0:
        shared = f" over spatial = {spatial}" if spatial > 1 else ""
        remedy = f"must divide the {len(processes)} devices of this run{shared}"
        found.append(LayoutProblem("execution.fsdp", fsdp, remedy))
    return found


def _refuse(problems: list[LayoutProblem]) -> None:
    """Raises `ConfigError` with the first problem, if there is one."""
    for problem in problems:
        require(False, problem.field, problem.value, problem.remedy)


def make_mesh(
    devices: Sequence[jax.Device] | None = None, *, num_shares: int | None = None, fsdp: int = 1, spatial: int = 1
) -> Mesh:
    """A mesh of devices along `data`, `fsdp` and, if it is more than 1, `spatial`.

    Args:
      devices: the devices, ordered by process, as each process has consecutive rows of a batch; None: all devices of
        all processes.
      num_shares: number of devices along `fsdp`; None: the largest divisor up to `MAX_SHARES`, so that up to this
        number of devices all of them take part in each collective. Collectives of several groups let the processes of
        a run on CPUs, which do not run them in one order, wait for each other for ever.
      fsdp: a setting of earlier versions; it is only checked.
      spatial: number of devices along `spatial`.

    Raises:
      ConfigError: `num_shares`, `fsdp` or `spatial` does not divide the number of devices, an image would be divided
        over several processes or GPUs, processes have different numbers of devices, or the devices are not ordered by
        process.
    """
    # JAX orders devices by number, and on some TPU pods the numbers of two hosts alternate.
    chosen = sorted(jax.devices(), key=lambda device: device.process_index) if devices is None else list(devices)
    processes = [device.process_index for device in chosen]
    _refuse(layout_problems(processes, fsdp=fsdp, spatial=spatial, platform=chosen[0].platform))
    num_groups = len(chosen) // spatial
    possible = [size for size in range(1, MAX_SHARES + 1) if num_groups % size == 0]
    shares = max(possible) if num_shares is None else num_shares
    require(shares in possible, "num_shares", shares, f"must be one of {possible}")
    if spatial == 1:
        return Mesh(np.asarray(chosen).reshape(-1, shares), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    axes = (*BATCH_AXES, SPATIAL_AXIS)
    return Mesh(np.asarray(chosen).reshape(-1, shares, spatial), axes, axis_types=(AxisType.Auto,) * 3)


def batch_shape(mesh: Mesh) -> dict[str, int]:
    """Number of shards along each axis that rows are divided over."""
    return {name: mesh.shape[name] for name in BATCH_AXES}


def num_batch_shards(mesh: Mesh) -> int:
    """Number of parts into which rows are divided: the number of devices, or of groups of devices that share images."""
    return math.prod(batch_shape(mesh).values())


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array of which every device has a whole copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, num_dims: int = 1) -> NamedSharding:
    """Sharding of rows over all devices; for images, which have four dimensions, also of the height if the mesh has the
    axis `spatial`."""
    is_divided = num_dims == 4 and SPATIAL_AXIS in mesh.shape
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, SPATIAL_AXIS) if is_divided else PartitionSpec(BATCH_AXES))


def num_pieces(shape: tuple[int, ...], num_parts: int) -> int:
    """Number of pieces along its input channels, the last but one axis, in which a kernel is summed where the bits must
    not depend on the number of devices.

    Args:
      shape: of the whole kernel.
      num_parts: number of parts of the batch, a multiple of the number of devices.
    """
    return math.gcd(shape[-2], num_parts, MAX_SHARES)


def sharded_axis(name: str, shape: tuple[int, ...], mesh: Mesh, num_parts: int | None) -> int | None:
    """The axis of a parameter (or of its momentum, or its EMA) that is divided over the mesh axis `fsdp`, or None.

    Kernels are divided along their input channels, whose rows fill tiles of memory. Other parameters, and kernels whose
    input channels cannot be divided evenly, are not divided.

    Args:
      name: of the parameter.
      shape: of the whole parameter.
      mesh: mesh over whose devices it is divided.
      num_parts: number of parts of the batch, where the bits must not depend on the number of devices; None: they may.
    """
    num_shares = mesh.shape[FSDP_AXIS]
    if num_shares == 1 or not name.endswith(".kernel"):
        return None
    pieces = shape[-2] if num_parts is None else num_pieces(shape, num_parts)
    return len(shape) - 2 if pieces % num_shares == 0 else None


def partition_spec(axis: int | None) -> PartitionSpec:
    """How a parameter, its momentum or its EMA is divided over the mesh."""
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP_AXIS)


def check_batch_size(field: str, batch_size: int, mesh: Mesh, num_microbatches: int | None = None) -> None:
    """Raises `ConfigError` unless every device gets the same number of equal parts of a batch.

    Args:
      field: name of the batch size in the message.
      batch_size: number of rows of the global batch.
      mesh: mesh over which the batch is divided.
      num_microbatches: number of parts of the batch; None: one for each device.
    """
    sizes = {field: batch_size}
    _refuse(layout_problems(**_layout_of(mesh), num_microbatches=num_microbatches, batch_sizes=sizes))


def check_image_size(field: str, image_size: int, mesh: Mesh) -> None:
    """Raises `ConfigError` unless images of `image_size` rows of pixels can be divided over `spatial`."""
    _refuse(layout_problems(**_layout_of(mesh), image_sizes={field: image_size}))


def count_turns(num_microbatches: int | None, mesh: Mesh) -> int:
    """Number of parts of a batch that each shard of the mesh computes, one after the other.

    Args:
      num_microbatches: number of parts of the batch; None: one for each shard.
      mesh: mesh over which the batch is divided.

    Raises:
      ConfigError: the parts cannot be divided equally.
    """
    _refuse(layout_problems(**_layout_of(mesh), num_microbatches=num_microbatches))
    return 1 if num_microbatches is None else num_microbatches // num_batch_shards(mesh)


def _layout_of(mesh: Mesh) -> dict[str, Any]:
    processes = [device.process_index for device in mesh.devices.flat]
    return {"processes": processes, "fsdp": 1, "spatial": mesh.shape.get(SPATIAL_AXIS, 1)}


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch as global arrays on the devices."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)
        for name, rows in batch.items()
    }
