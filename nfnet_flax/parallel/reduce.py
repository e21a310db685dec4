"""Sums in a fixed order, which have the same bits on any number of devices.

The gradients of `num_microbatches` (a power of two) equal parts of a batch are added in one binary tree over their
positions in the batch: neighbours first, then pairs of neighbours, and so on. Each device adds the gradients of its
consecutive microbatches; the sums of the devices are added along the upper part of the same tree. Addition in floating
point is commutative, so the result depends only on the parts.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnet_flax.open_config import OpenConfig, declare_kinds
from nfnet_flax.parallel.mesh import FSDP_AXIS, MAX_SHARES

Arrays = dict[str, jax.Array]
_BUCKET_BYTES = 1 << 18
"""Arrays smaller than this are sent together, because for small ones only the latency of a collective counts."""
_MAX_PIECES = MAX_SHARES
"""Largest number of devices that add together. More devices add level by level, because a 256th part of a kernel is
less than a tile of memory."""


def tree_sum(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum of arrays, whose number is a power of two; neighbours are added first."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """A result of one part of the batch, and how the result of the whole batch is computed from those of the parts."""

    value: jax.Array
    """The result of this part."""
    combine: Literal["sum", "same"] = dataclasses.field(default="sum", metadata={"static": True})
    """`sum`: the values of all parts are added; `same`: they are equal, so that of any part is taken."""


Parts = dict[str, Part]


def added(left: Parts, right: Parts) -> Parts:
    """The combined results of two parts of a batch."""
    return {
        name: Part(left[name].value + part.value) if part.combine == "sum" else part for name, part in right.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction(OpenConfig, abc.ABC):
    """How the results of the devices, each of a part of the batch, become those of the whole batch."""

    @property
    def is_reproducible(self) -> bool:
        """Whether the same parts of a batch give the same bits on any number of devices; by default False."""
        return False

    @abc.abstractmethod
    def over_devices(
        self, parts: Parts, sharded_axes: Mapping[str, int | None], mesh_shape: Mapping[str, int]
    ) -> Arrays:
        """The combined results; called on each device, under `shard_map` over the axes `data` and `fsdp`.

        Args:
          parts: what this device has, by name: gradients by the names of the parameters, running statistics, metrics.
          sharded_axes: of each array the axis along which the result is divided over `fsdp`; None: every device gets
            all of it.
          mesh_shape: number of devices along each mesh axis.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedSum(Reduction):
    """A sum in the order of a binary tree over the parts of the batch."""

    @property
    def is_reproducible(self) -> bool:
        return True

    def over_devices(
        self, parts: Parts, sharded_axes: Mapping[str, int | None], mesh_shape: Mapping[str, int]
    ) -> Arrays:
        return sum_over_devices(parts, sharded_axes, mesh_shape, reproducible=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastSum(Reduction):
    """A sum in the order that the devices' library chooses as the fastest."""

    def over_devices(
        self, parts: Parts, sharded_axes: Mapping[str, int | None], mesh_shape: Mapping[str, int]
    ) -> Arrays:
        return sum_over_devices(parts, sharded_axes, mesh_shape, reproducible=False)


declare_kinds(Reduction, OrderedSum, FastSum)


def sum_over_devices(
    parts: Parts, sharded_axes: Mapping[str, int | None], mesh_shape: Mapping[str, int], *, reproducible: bool
) -> Arrays:
    """Adds the arrays of all devices; to be called under `shard_map` over the axes of `mesh_shape`.

    With `reproducible`, every device is responsible for one piece of each array: it receives this piece from all
    devices and adds the versions in a binary tree; then the pieces are gathered. This sends as many bytes as the usual
    ring algorithm, and with more than 16 devices a sixteenth more. Small arrays that are not sharded are sent together.

    Args:
      parts: of this device's part of the batch: float32, or whole numbers, in whose sum no order shows.
      sharded_axes: of each array the axis along which the result is divided over `fsdp`; None: every device gets all.
      mesh_shape: number of devices along each mesh axis, powers of two. Neighbours lie along the last one.
      reproducible: whether to add in the order of the tree; otherwise the library's sum is used.
    """
    result = {name: part.value for name, part in parts.items() if part.combine == "same"}
    values = {name: part.value for name, part in parts.items() if part.combine == "sum"}
    mesh_shape = {name: size for name, size in mesh_shape.items() if size > 1}
    if not mesh_shape:
        return result | values  # the library's sum would copy them
    in_any_order = [name for name, value in values.items() if not (reproducible and is_float(value))]
    result |= {name: _psum(values.pop(name), sharded_axes[name], mesh_shape) for name in in_any_order}
    small = [name for name, value in values.items() if sharded_axes[name] is None and value.nbytes < _BUCKET_BYTES]
    result |= {
        name: _tree_psum(value, sharded_axes[name], mesh_shape) for name, value in values.items() if name not in small
    }
    if not small:
        return result
    flat = jnp.concatenate([jnp.ravel(values[name]) for name in small])
    total = _tree_psum(flat, None, mesh_shape)
    ends = np.cumsum([values[name].size for name in small])[:-1]
    pieces = jnp.split(total, ends)
    return result | {name: piece.reshape(values[name].shape) for name, piece in zip(small, pieces, strict=True)}


def is_float(value: jax.Array) -> bool:
    """Whether the bits of a sum of such arrays depend on the order."""
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _psum(value: jax.Array, sharded_axis: int | None, mesh_shape: Mapping[str, int]) -> jax.Array:
    others = dict(mesh_shape)
    if sharded_axis is not None and others.pop(FSDP_AXIS, None) is not None:
        # A TPU's compiler sends an array whose first axes have length 1 whole, so they are left out meanwhile.
        num_empty = next(i for i in range(sharded_axis + 1) if i == sharded_axis or value.shape[i] > 1)
        value = lax.squeeze(value, range(num_empty))
        value = lax.psum_scatter(value, FSDP_AXIS, scatter_dimension=sharded_axis - num_empty, tiled=True)
        value = lax.expand_dims(value, range(num_empty))
    return lax.psum(value, tuple(others)) if others else value


def _tree_psum(value: jax.Array, sharded_axis: int | None, mesh_shape: Mapping[str, int]) -> jax.Array:
    undo = []
    for name in reversed(list(mesh_shape)):
        for num_pieces, groups in _levels(mesh_shape[name]):
            if sharded_axis is not None and name == FSDP_AXIS:
                value = _sum_of_piece(value, name, num_pieces, sharded_axis, groups)
                continue
            axis = _piece_axis(value.shape, num_pieces)
            padding = -value.shape[axis] % num_pieces
            if padding:
                value = jnp.pad(value, [(0, padding if i == axis else 0) for i in range(value.ndim)])
            value = _sum_of_piece(value, name, num_pieces, axis, groups)
            undo.append((name, axis, padding, groups))
    for name, axis, padding, groups in reversed(undo):
        value = lax.all_gather(value, name, axis=axis, tiled=True, axis_index_groups=groups)
        value = lax.slice_in_dim(value, 0, value.shape[axis] - padding, axis=axis)
    return value


_Groups = list[list[int]] | None
"""Groups of positions along a mesh axis that exchange data; None: all positions are one group."""


def _levels(num_devices: int) -> list[tuple[int, _Groups]]:
    """For each level, the number of devices that add together, and their groups; neighbours add first."""
    if num_devices <= _MAX_PIECES:
        return [(num_devices, None)] if num_devices > 1 else []
    found: list[tuple[int, _Groups]] = []
    stride = 1
    while stride < num_devices:
        size = min(_MAX_PIECES, num_devices // stride)
        starts = [start for start in range(num_devices) if start // stride % size == 0]
        found.append((size, [[start + stride * i for i in range(size)] for start in starts]))
        stride *= size
    return found


def _sum_of_piece(value: jax.Array, axis_name: str, num_pieces: int, axis: int, groups: _Groups) -> jax.Array:
    """This device's piece of an array along an axis: the versions of all devices of a group, added in a binary tree."""
    size = value.shape[axis] // num_pieces
    pieces = value.reshape(*value.shape[:axis], num_pieces, size, *value.shape[axis + 1 :])
    versions = lax.all_to_all(pieces, axis_name, split_axis=axis, concat_axis=0, axis_index_groups=groups)
    return tree_sum([versions[i] for i in range(num_pieces)])


def _piece_axis(shape: tuple[int, ...], num_pieces: int) -> int:
    """The axis along which to cut: one that leaves whole tiles of 8 rows or 128 lanes, if possible; else the
    longest."""
    rows, lanes = len(shape) - 2, len(shape) - 1
    if rows >= 0 and shape[rows] % (8 * num_pieces) == 0:
        return rows
    if shape[lanes] % (128 * num_pieces) == 0:
        return lanes
    divisible = [axis for axis, size in enumerate(shape) if size % num_pieces == 0]
    return max(divisible or range(len(shape)), key=lambda axis: shape[axis])


def gathered(values: Arrays, sharded_axes: Mapping[str, int | None]) -> Arrays:
    """Whole arrays from the shares along `fsdp`; to be called under `shard_map`."""
    whole = dict(values)
    for name, value in values.items():
        if (axis := sharded_axes[name]) is not None:
            whole[name] = lax.all_gather(value, FSDP_AXIS, axis=axis, tiled=True)
    return whole
