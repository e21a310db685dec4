"""Which share of the state a device holds and updates, and what it learns of whole kernels; for use under `shard_map`.

Kernels are divided along their input channels over neighbouring devices (`mesh.FSDP_AXIS`). So the rows of a share fill
tiles of memory, and all output channels of a kernel are on every device. Sums over the input channels of a kernel are
made of the sums of pieces whose size does not depend on the number of devices: one loop body computes those of a piece,
and they are added in one binary tree over the pieces. So the sums are rounded alike on any number of devices. Whatever
else is done to a share is done to each element by itself.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from nfnet_flax.models.standardization import rough_mean
from nfnet_flax.parallel.mesh import FSDP_AXIS, num_pieces
from nfnet_flax.parallel.reduce import Part, sum_over_devices
from nfnet_flax.parallel.rounding import separately_rounded
from nfnet_flax.parallel.turns import bound_to_turn, stack_of_turns
from nfnet_flax.training.state import Structure

Sums = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Shares:
    """A `preparation.Division` of kernels over devices."""

    axes: Mapping[str, int | None]
    """Name of a parameter -> its axis that is divided, or None."""
    num_devices: int
    """Number of devices over which the state is divided."""
    num_parts: int | None
    """Number of parts of a batch, where the bits must not depend on the number of devices; None: they may."""
    platform: str
    """Platform of the devices."""
    not_negative: jax.Array
    """Any number that is never negative; see `turns.stack_of_turns`."""

    def num_shares(self, name: str) -> int:
        """Number of equal shares into which a kernel is divided."""
        return 1 if self.axes[name] is None else self.num_devices

    def rough_means(self, kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A number near the mean of each output channel of whole kernels, the same on every device."""
        if self.num_parts is None and self.num_devices == 1:
            return {name: rough_mean(kernel) for name, kernel in kernels.items()}
        # A single entry, as the mean of several could be rounded in different ways.
        found = {name: kernel[0, 0, 0] for name, kernel in kernels.items()}
        divided = {name: value for name, value in found.items() if self.num_shares(name) > 1}
        if divided:
            is_first = lax.axis_index(FSDP_AXIS) == 0
            of_first = jnp.where(is_first, _joined(divided), 0.0)
            found |= _parted(lax.psum(of_first, FSDP_AXIS), divided)
        return found

    def sums(self, function: Callable[..., Sums], arrays: Mapping[str, Sums]) -> dict[str, Sums]:
        """Adds what `function(name, *arrays)` gives for pieces of kernels; see `preparation.Division`."""
        names_of: dict[int, list[str]] = defaultdict(list)
        for name, (first, *_) in arrays.items():
            whole = (*first.shape[:-2], first.shape[-2] * self.num_shares(name), first.shape[-1])
            pieces = self.num_shares(name) if self.num_parts is None else num_pieces(whole, self.num_parts)
            names_of[pieces].append(name)
        found: dict[str, Sums] = {}
        for pieces, names in names_of.items():  # either all of these are divided or none
            found |= self._sums_of(function, {name: arrays[name] for name in names}, pieces)
        return {name: found[name] for name in arrays}

    def _sums_of(self, function: Callable[..., Sums], arrays: Mapping[str, Sums], pieces: int) -> dict[str, Sums]:
        """`sums` of kernels that consist of the same number of pieces."""
        num_shares = self.num_shares(next(iter(arrays)))

        def sums_of(arrays: Mapping[str, Sums]) -> dict[str, Sums]:
            return {name: function(name, *given) for name, given in arrays.items()}

        if self.num_parts is None:
            here = sums_of(arrays)
            summed: dict[str, Sums] = here if num_shares == 1 else _parted(lax.psum(_joined(here), FSDP_AXIS), here)
            return summed
        num_turns = pieces // num_shares

        # In the loop, too: the choice of a piece is fused with the sums, and there is none for a single piece.
        rounded = separately_rounded(sums_of, lambda _: self.not_negative, self.platform)

        def turn(index: jax.Array) -> dict[str, jax.Array]:
            return {"all": _joined(rounded(_piece(arrays, index, num_turns)))}

        rows = stack_of_turns(turn, num_turns, self.not_negative)["all"]
        while len(rows) > 1:
            rows = rows[::2] + rows[1::2]
        total = rows[0]
        if num_shares > 1:
            parts, mesh_shape = {"all": Part(total)}, {FSDP_AXIS: num_shares}
            total = sum_over_devices(parts, {"all": None}, mesh_shape, reproducible=True)["all"]
        found: dict[str, Sums] = _parted(total, jax.eval_shape(sums_of, arrays))
        return found


def _joined(arrays: Any) -> jax.Array:
    """All elements of a tree of arrays, one array after the other: (N,)."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(arrays)])


def _parted(vector: jax.Array, like: Any) -> Any:
    """The inverse of `_joined`; `like` is a tree with the shapes of the arrays."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])[:-1]
    parts = zip(jnp.split(vector, ends), leaves, strict=True)
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in parts])


def _piece(arrays: Mapping[str, Sums], index: jax.Array, num_turns: int) -> dict[str, Sums]:
    """One of `num_turns` pieces of all kernels, with what belongs to whole output channels."""

    def piece(array: jax.Array) -> jax.Array:
        if array.ndim == 1:
            return array
        size = array.shape[-2] // num_turns
        return lax.dynamic_slice_in_dim(array, index * size, size, axis=-2)

    bound: dict[str, Sums] = bound_to_turn({name: tuple(map(piece, given)) for name, given in arrays.items()}, index)
    return bound


def shares_of(structure: Structure, mesh: Mesh, not_negative: jax.Array) -> Shares:
    """How the kernels of a network are divided over the devices of a mesh; for use under `shard_map`.

    Args:
      structure: structure of the network, and how it is computed.
      mesh: mesh of the state.
      not_negative: any whole number that is never negative.
    """
    return Shares(
        axes=structure.sharded_axes(mesh),
        num_devices=mesh.shape[FSDP_AXIS],
        num_parts=structure.num_parts,
        platform=mesh.devices.flat[0].platform,
        not_negative=not_negative,
    )
