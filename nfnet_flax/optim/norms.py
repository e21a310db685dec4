"""Sums and norms over many small arrays.

On an accelerator a sum over an array takes about a microsecond, however small the array is, and a network has hundreds
of vectors. So arrays of one shape are added first, or put together, before there is a sum over elements.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp


def sum_of_all(arrays: Iterable[jax.Array]) -> jax.Array:
    """Sum of all elements of all arrays, a float32 scalar."""
    by_shape: dict[tuple[int, ...], list[jax.Array]] = defaultdict(list)
    for array in arrays:
        by_shape[array.shape].append(array)
    total = jnp.zeros((), jnp.float32)
    for group in by_shape.values():
        added = group[0].astype(jnp.float32)
        for array in group[1:]:
            added += array
        total += jnp.sum(added)
    return total


@jax.named_scope("norm")
def global_norm(
    gradient: Mapping[str, jax.Array], norms: Mapping[str, tuple[jax.Array, jax.Array] | None]
) -> jax.Array:
    """L2 norm of a whole gradient.

    Args:
      gradient: name of a parameter -> array.
      norms: of some parameters, norms of the gradient's and the parameter's units. The array of such a parameter is not
        read, and may be a part of the gradient.
    """
    parts = (value if (known := norms.get(name)) is None else known[0] for name, value in gradient.items())
    return jnp.sqrt(sum_of_all(jnp.square(part) for part in parts))


def whole_norms(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """L2 norm of each array as a whole, of shape (1, ..., 1)."""
    found: list[jax.Array | None] = [None] * len(arrays)
    alike: dict[tuple[tuple[int, ...], jnp.dtype], list[int]] = defaultdict(list)
    for index, array in enumerate(arrays):
        alike[array.shape, array.dtype].append(index)
    for (shape, _), indices in alike.items():
        rows = jnp.stack([arrays[index].reshape(math.prod(shape)) for index in indices])
        norms = jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))
        for row, index in enumerate(indices):
            found[index] = norms[row].reshape((1,) * len(shape))
    return [norm for norm in found if norm is not None]
