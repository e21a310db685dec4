"""Brings a state that is divided over processes into the host memory of process 0."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_GROUP_BYTES = 1 << 30
"""Number of bytes that a device holds whole at a time, besides its share of the state."""


def gathered(state: Any) -> Any:
    """The state as arrays of NumPy in process 0; None in the others. To be called by all processes."""
    leaves, structure = jax.tree.flatten(state)
    is_first = jax.process_index() == 0
    found: list[np.ndarray] = []
    for group in _groups(leaves):
        whole = _program(tuple(_mesh_of(leaf) for leaf in group))(group)
        if is_first:
            found += [np.asarray(leaf.addressable_data(0)) for leaf in whole]
    return jax.tree.unflatten(structure, found) if is_first else None


def _mesh_of(array: jax.Array) -> Mesh:
    assert isinstance(array.sharding, NamedSharding)
    mesh = array.sharding.mesh
    assert isinstance(mesh, Mesh)
    return mesh


def _groups(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    groups: list[list[jax.Array]] = [[]]
    num_bytes = 0
    for leaf in leaves:
        if groups[-1] and num_bytes + leaf.nbytes > _GROUP_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(leaf)
        num_bytes += leaf.nbytes
    return groups


@functools.cache
def _program(meshes: tuple[Mesh, ...]) -> jax.stages.Wrapped:
    return jax.jit(lambda arrays: arrays, out_shardings=[NamedSharding(mesh, PartitionSpec()) for mesh in meshes])
