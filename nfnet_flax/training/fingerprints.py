"""Checksums of the arrays of a state, which do not depend on sharding, number of devices or number of processes.

Orbax writes array data without checksums: a flipped byte is read as another number without an error. So each checkpoint
contains the checksums that are computed here, and arrays are compared with them when they are read.

The words of an array (each element bit-cast to an unsigned integer, widened to uint32) are multiplied by odd weights
that depend on their positions, mixed by the multiply and xor-shift steps of MurmurHash3's finalizer, and added modulo
2^32; the sum does not depend on the order. Multiplication by an odd number and xor-shift are invertible, so a change of
one element always changes the sum; other changes are missed with a probability of about one in 2^32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Fingerprints = dict[str, str]
"""Name of an array of a state -> its type, shape and checksum, such as `float32[3,3,16,32] 0123abcd`."""

_WORDS = {1: "uint8", 2: "uint16", 4: "uint32"}
_FACTOR = 0x85EBCA6B
_HOST_CHUNK = 1 << 16
"""Number of elements that are mixed at a time on the host, so that temporary arrays fit into the processor's cache."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a tree, by the names that Orbax uses on disk: the keys of the path, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(_key(part) for part in path): leaf for path, leaf in leaves}


def _key(part: Any) -> str:
    match part:
        case jax.tree_util.DictKey(key=name):
            return str(name)
        case jax.tree_util.GetAttrKey(name=name):
            return name
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
    raise TypeError(f"no name for {part!r} in a state")


class CopiesDiffer(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """Devices or processes hold different copies of the same array. The message names them and the arrays."""


def fingerprints(state: Any) -> Fingerprints:
    """Fingerprints of all arrays of a state, in one pass over it. Waits for the state.

    Raises:
      CopiesDiffer: the devices of this process hold different copies of an array.
      TypeError: the elements of an array do not have 1, 2 or 4 bytes.
    """
    arrays = named_leaves(state)
    on_devices = {name: array for name, array in arrays.items() if not _is_whole_in_host_memory(array)}
    of_devices = dict(zip(on_devices, _device_totals(list(on_devices.values())), strict=True))
    found: Fingerprints = {}
    for name, array in arrays.items():
        if name in of_devices:
            copies = [_describe(array, total) for total in of_devices[name]]
        else:
            copies = [host_fingerprint(np.asarray(shard.data)) for shard in array.addressable_shards]
        if len(set(copies)) > 1:
            raise CopiesDiffer(
                f"the devices of this process hold different copies of {name}: {', '.join(copies)}. "
                "One of them computes wrongly, or its memory is faulty"
            )
        found[name] = copies[0]
    return found


def host_fingerprint(array: np.ndarray) -> str:
    """Fingerprint of one array in the host's memory, computed without a device."""
    flat = np.ascontiguousarray(array).reshape(-1).view(_word(array.dtype))
    total = 0
    for start in range(0, flat.size, _HOST_CHUNK):
        words = flat[start : start + _HOST_CHUNK].astype(np.uint32)
        positions = np.arange(start, start + words.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(_mix(words, positions), dtype=np.uint64))
    return _describe(array, total & 0xFFFFFFFF)


def _is_whole_in_host_memory(array: jax.Array) -> bool:
    """Whether the host can compute the checksum. On CPUs this avoids compiling, which takes longer than the sums."""
    return array.is_fully_replicated and all(shard.device.platform == "cpu" for shard in array.addressable_shards)


def _device_totals(arrays: list[jax.Array]) -> list[list[int]]:
    """For each array, the sums that the devices of this process compute; a device with a whole copy uses that copy."""
    if not arrays:
        return []
    # Every process needs all sums, whatever the shardings of the arrays.
    sharding = arrays[0].sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    totals = [np.asarray(shard.data).tolist() for shard in _program(whole)(arrays).addressable_shards]
    return [list(of_one) for of_one in zip(*totals, strict=True)]


@functools.cache
def _program(whole: NamedSharding | None) -> jax.stages.Wrapped:
    return jax.jit(lambda arrays: jnp.stack([_device_sum(array) for array in arrays]), out_shardings=whole)


def _device_sum(array: jax.Array) -> jax.Array:
    words = array.view(_word(array.dtype)).astype(jnp.uint32)
    # Positions in the flattened array; flattening the array itself would gather it if it is sharded.
    positions = jnp.zeros(array.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
        positions += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride & 0xFFFFFFFF)
        stride *= array.shape[axis]
    return jnp.sum(_mix(words, positions), dtype=jnp.uint32)


def _mix(words: Any, positions: Any) -> Any:
    """Mixes the words of an array with their positions, for NumPy and JAX; uint32 that wraps around."""
    mixed = words * (positions * np.uint32(2) + np.uint32(1))
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(_FACTOR)
    mixed ^= mixed >> np.uint32(13)
    return mixed


def _word(dtype: np.dtype) -> str:
    if dtype.itemsize not in _WORDS:
        raise TypeError(f"no checksum of {dtype} arrays: elements of 1, 2 or 4 bytes are known")
    return _WORDS[dtype.itemsize]


def _describe(array: Any, total: int) -> str:
    return f"{describe_type(array)} {total:08x}"


def describe_type(array: Any) -> str:
    """Type and shape of an array as text, such as `float32[3,3,16,32]`."""
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"
