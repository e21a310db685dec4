"""Sums in a fixed order: the same bits whatever number of devices the microbatches lie on.

The gradients of `num_microbatches` (a power of two) equal parts of a batch are added in one binary tree over their
positions in the batch: neighbours first, then pairs of neighbours, and so on. Each device adds those of its consecutive
microbatches; the devices add theirs along the upper part of the same tree. Addition commutes in floating point, so the
result depends on the parts alone.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnet_flax.open_config import OpenConfig, declare_kinds
from nfnet_flax.parallel.mesh import DATA_AXIS, FSDP_AXIS

Arrays = dict[str, jax.Array]
_BUCKET_BYTES = 1 << 18
"""Arrays below this travel together: on small ones a collective's latency is all that counts."""
_MAX_PIECES = 16
"""More devices add level by level, so many at a time: the 256th part of a kernel is less than a tile of memory."""


_AN_INDEX = jax.ShapeDtypeStruct((), jnp.int32, weak_type=True)
"""As a loop counts: so that what is traced for its shapes is not traced again in the loop, which takes seconds."""


def tree_sum(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum of a power of two of arrays, neighbours first."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """What a part of the batch gives, and how those of all parts make that of the whole batch."""

    value: jax.Array
    combine: Literal["sum", "same"] = dataclasses.field(default="sum", metadata={"static": True})
    """Added, or taken from any part, as it is the same in all."""


Parts = dict[str, Part]


def added(left: Parts, right: Parts) -> Parts:
    """What two parts of a batch give together."""
    return {
        name: Part(left[name].value + part.value) if part.combine == "sum" else part for name, part in right.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction(OpenConfig, abc.ABC):
    """How what every device has found in its part of the batch becomes that of the whole batch."""

    @property
    def is_reproducible(self) -> bool:
        """Whether the same parts of a batch give the same bits on any number of devices; by default not."""
        return False

    @abc.abstractmethod
    def over_devices(
        self, parts: Parts, sharded_axes: Mapping[str, int | None], mesh_shape: Mapping[str, int]
    ) -> Arrays:
        """The sums; called on each device, under `shard_map` over the axes `data` and `fsdp`.

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
    """A sum in whatever order the devices' library finds fastest."""

    def over_devices(
        self, parts: Parts, sharded_axes: Mapping[str, int | None], mesh_shape: Mapping[str, int]
    ) -> Arrays:
        return sum_over_devices(parts, sharded_axes, mesh_shape, reproducible=False)


declare_kinds(Reduction, OrderedSum, FastSum)


def _loop(num_turns: int, not_negative: jax.Array, turn: Callable[[jax.Array, Any], Any], held: Any) -> Any:
    """A loop whose number of turns the compiler cannot know, as it depends on a number that is never negative.

    So a loop, be it of one turn, is neither unrolled nor fused with what surrounds it, and its body is rounded alike
    however many turns there are.
    """
    with jax.named_scope(f"turns_{num_turns}"):  # `hlo.py` reads the number from this name
        return lax.fori_loop(0, jnp.minimum(num_turns, num_turns + not_negative.astype(jnp.int32)), turn, held)


def bound_to_turn(values: Any, index: jax.Array) -> Any:
    """`values`, a tree of arrays, bound to the turn `index`.

    What is the same in every turn, as all is where there is but one, compilers move out of the loop: half of the body
    would then be fused, and rounded, with what surrounds it.
    """
    return lax.optimization_barrier((values, index))[0]


def used_in_turn(value: jax.Array, index: jax.Array) -> jax.Array:
    """`value` times a one that the compiler cannot know: what is made of it is made in the turn `index`.

    A TPU's compiler moves the conversion of what is `bound_to_turn`, too, out of the loop, where it is a pass over
    memory; here it becomes part of the product that it is for.
    """
    return value * jnp.where(index < 0, 0.0, 1.0).astype(value.dtype)


def sum_of_turns(turn: Callable[[jax.Array], Parts], num_turns: int, not_negative: jax.Array) -> Parts:
    """Adds what `turn(index)` gives for index 0 to `num_turns - 1` in a binary tree, one turn after the other.

    Args:
      turn: of what one part gives; see `added`.
      num_turns: a power of two.
      not_negative: any number that is never negative; see `_loop`.

    Returns:
      The sum. It takes `1 + log2(num_turns)` times the memory of what one turn gives.
    """
    num_levels = num_turns.bit_length()
    turn = jax.jit(turn, inline=True)
    shapes = jax.eval_shape(turn, _AN_INDEX)
    # Zeros would cost a pass over memory; each level is set before it is read.
    unset = jax.tree.map(lambda leaf: lax.empty(leaf.shape, leaf.dtype), shapes)

    def carry_to(level: int) -> Callable[[list[Parts], Parts], list[Parts]]:
        # As in counting: what stands in the lower levels is added to what is carried on.
        def carry(held: list[Parts], total: Parts) -> list[Parts]:
            for lower in held[:level]:
                total = added(lower, total)
            return [*held[:level], total, *held[level + 1 :]]

        return carry

    def one_turn(index: jax.Array, held: list[Parts]) -> list[Parts]:
        num_ones = lax.population_count(index ^ (index + 1)) - 1
        return lax.switch(num_ones, [carry_to(level) for level in range(num_levels)], held, turn(index))

    return _loop(num_turns, not_negative, one_turn, [unset] * num_levels)[-1]


def stack_of_turns(turn: Callable[[jax.Array], Arrays], num_turns: int, not_negative: jax.Array) -> Arrays:
    """What `turn(index)` gives for index 0 to `num_turns - 1`, stacked along a new first axis."""
    turn = jax.jit(turn, inline=True)
    shapes = jax.eval_shape(turn, _AN_INDEX)
    unset = {name: lax.empty((num_turns, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}

    def one_turn(index: jax.Array, held: Arrays) -> Arrays:
        found = turn(index)
        return {name: lax.dynamic_update_index_in_dim(held[name], found[name], index, 0) for name in held}

    return _loop(num_turns, not_negative, one_turn, unset)


def sum_over_devices(
    parts: Parts, sharded_axes: Mapping[str, int | None], mesh_shape: Mapping[str, int], *, reproducible: bool
) -> Arrays:
    """Adds the arrays of all devices; to be called under `shard_map` over `data` and `fsdp`.

    In reproducible form every device adds one piece of each array, of which it is sent all devices' versions, in a
    binary tree; the pieces are then gathered. That moves as many bytes as the usual ring does, and with
    more than 16 devices a sixteenth more. Arrays that are not sharded and small travel together.

    Args:
      parts: of this device's part of the batch: float32, or whole numbers, in whose sum no order shows.
      sharded_axes: of each array the axis along which the result is divided over `fsdp`; None: every device gets all.
      mesh_shape: number of devices along each mesh axis, powers of two; neighbours lie along `fsdp`.
      reproducible: keep the order of the tree; otherwise the library's sum.
    """
    result = {name: part.value for name, part in parts.items() if part.combine == "same"}
    values = {name: part.value for name, part in parts.items() if part.combine == "sum"}
    in_any_order = [name for name, value in values.items() if not (reproducible and is_float(value))]
    result |= {name: _psum(values.pop(name), sharded_axes[name], mesh_shape) for name in in_any_order}
    small = [name for name, value in values.items() if sharded_axes[name] is None and value.nbytes < _BUCKET_BYTES]
    result |= {
        name: _tree_psum(value, sharded_axes[name], mesh_shape) for name, value in values.items() if name not in small
    }
    if small and math.prod(mesh_shape.values()) > 1:
        flat = jnp.concatenate([jnp.ravel(values[name]) for name in small])
        total = _tree_psum(flat, None, mesh_shape)
        ends = np.cumsum([values[name].size for name in small])[:-1]
        pieces = jnp.split(total, ends)
        return result | {name: piece.reshape(values[name].shape) for name, piece in zip(small, pieces, strict=True)}
    return result | {name: values[name] for name in small}


def is_float(value: jax.Array) -> bool:
    """Whether the order of a sum shows in its bits."""
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _psum(value: jax.Array, sharded_axis: int | None, mesh_shape: Mapping[str, int]) -> jax.Array:
    if math.prod(mesh_shape.values()) == 1:
        return value  # the library would copy it
    if sharded_axis is None:
        return lax.psum(value, (DATA_AXIS, FSDP_AXIS))
    value = lax.psum_scatter(value, FSDP_AXIS, scatter_dimension=sharded_axis, tiled=True)
    return lax.psum(value, DATA_AXIS)


def _tree_psum(value: jax.Array, sharded_axis: int | None, mesh_shape: Mapping[str, int]) -> jax.Array:
    shape, undo = value.shape, []
    # Neighbours of the tree lie along the minor axis of the mesh.
    for name in (FSDP_AXIS, DATA_AXIS):
        if name == FSDP_AXIS and sharded_axis is not None and mesh_shape[name] > 1:
            value = _sum_of_piece(value, name, mesh_shape[name], sharded_axis, None)
            continue
        for num_pieces, groups in _levels(mesh_shape[name]):
            axis = _piece_axis(value.shape, num_pieces)
            padding = -value.shape[axis] % num_pieces
            if padding:
                value = jnp.pad(value, [(0, padding if i == axis else 0) for i in range(value.ndim)])
            value = _sum_of_piece(value, name, num_pieces, axis, groups)
            undo.append((name, axis, padding, groups))
    for name, axis, padding, groups in reversed(undo):
        value = lax.all_gather(value, name, axis=axis, tiled=True, axis_index_groups=groups)
        value = lax.slice_in_dim(value, 0, value.shape[axis] - padding, axis=axis)
    assert sharded_axis is not None or value.shape == shape
    return value


_Groups = list[list[int]] | None
"""Positions along a mesh axis that exchange with one another; None: all."""


def _levels(num_devices: int) -> list[tuple[int, _Groups]]:
    """Number of devices that add together, and their groups, level by level: neighbours first."""
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
    """All versions, within a group, of this device's piece of an array along an axis, added in a binary tree."""
    size = value.shape[axis] // num_pieces
    pieces = value.reshape(*value.shape[:axis], num_pieces, size, *value.shape[axis + 1 :])
    versions = lax.all_to_all(pieces, axis_name, split_axis=axis, concat_axis=0, axis_index_groups=groups)
    return tree_sum([versions[i] for i in range(num_pieces)])


def _piece_axis(shape: tuple[int, ...], num_pieces: int) -> int:
    """The axis to cut: one that leaves whole tiles of 8 rows or 128 lanes if there is one, else the longest."""
    rows, lanes = len(shape) - 2, len(shape) - 1
    if rows >= 0 and shape[rows] % (8 * num_pieces) == 0:
        return rows
    if shape[lanes] % (128 * num_pieces) == 0:
        return lanes
    divisible = [axis for axis, size in enumerate(shape) if size % num_pieces == 0]
    return max(divisible or range(len(shape)), key=lambda axis: shape[axis])


def gathered(values: Arrays, sharded_axes: Mapping[str, int | None]) -> Arrays:
    """Whole arrays from the shards along `fsdp`; to be called under `shard_map`."""
    return {
        name: value if (axis := sharded_axes[name]) is None else lax.all_gather(value, FSDP_AXIS, axis=axis, tiled=True)
        for name, value in values.items()
    }
