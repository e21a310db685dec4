"""Loops over the parts of a batch, or over pieces of kernels, whose body is compiled to the same code for any number of
turns.

A body that is rounded alike whatever the number of devices needs the same operations in each layout: the loop is never
unrolled, nothing in it is moved out of it, and its rows are chosen by the index, also if there is no choice.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from nfnet_flax.parallel.reduce import Arrays, Parts, added

Tree = TypeVar("Tree")
_AN_INDEX = jax.ShapeDtypeStruct((), jnp.int32, weak_type=True)
"""Type of a loop's index. With the same type, a function that was traced for its shapes is not traced again in the
loop, which would take seconds."""


def cut_rows(batch: Tree, num_turns: int, *, is_alike: bool) -> Tree:
    """The rows of a batch, cut along a new first axis into the rows of each turn.

    Args:
      batch: tree of arrays with the same number of rows.
      num_turns: number of turns of the loop, which divides the number of rows.
      is_alike: whether the loop must be compiled alike for any number of turns. Then the rows of a single turn are
        there twice, the second time never used: where there is no choice, compilers fuse the body differently.
    """

    def cut(rows: jax.Array) -> jax.Array:
        parts = rows.reshape(num_turns, rows.shape[0] // num_turns, *rows.shape[1:])
        return jnp.concatenate([parts, parts]) if is_alike and num_turns == 1 else parts

    found: Tree = jax.tree.map(cut, batch)
    return found


def _loop(num_turns: int, not_negative: jax.Array, turn: Callable[[jax.Array, Any], Any], held: Any) -> Any:
    """A loop whose number of turns the compiler does not know, because it depends on `not_negative`.

    So the compiler neither unrolls the loop nor fuses it with the code around it, not even for one turn, and rounding
    in its body does not depend on the number of turns.
    """
    with jax.named_scope(f"turns_{num_turns}"):  # `hlo.py` reads the number from this name
        return lax.fori_loop(0, jnp.minimum(num_turns, num_turns + not_negative.astype(jnp.int32)), turn, held)


def bound_to_turn(values: Any, index: jax.Array) -> Any:
    """Makes `values`, a tree of arrays, depend on the turn `index` of a loop.

    Compilers move computations that are the same in every turn out of the loop; with a single turn, these are all. A
    part of the loop's body would then be fused with the code around the loop, and rounded differently.
    """
    return lax.optimization_barrier((values, index))[0]


def used_in_turn(value: jax.Array, index: jax.Array) -> jax.Array:
    """`value` multiplied by a one that the compiler cannot know, so that it is converted in the turn `index`.

    A TPU's compiler moves even the type conversion of a value that is `bound_to_turn` out of the loop, where it takes a
    pass over memory; with this factor the conversion becomes part of the product that uses the value.
    """
    return value * jnp.where(index < 0, 0.0, 1.0).astype(value.dtype)


def sum_of_turns(turn: Callable[[jax.Array], Parts], num_turns: int, not_negative: jax.Array) -> Parts:
    """Adds the results of `turn(index)` for index 0 to `num_turns - 1` in a binary tree, one turn after the other.

    Args:
      turn: function that returns the results of one part; `added` adds two of them.
      num_turns: number of parts, a power of two.
      not_negative: any number that is never negative; see `_loop`.

    Returns:
      The sum. Computing it takes `1 + log2(num_turns)` times the memory of one turn's results.
    """
    num_levels = num_turns.bit_length() - 1
    turn = jax.jit(turn, inline=True)
    shapes = jax.eval_shape(turn, _AN_INDEX)

    # Not zeros, which would take a pass over memory; each level is set before it is read. The levels are rows of one
    # array, as the compiler for GPUs would copy separate ones in every turn.
    def unset(*sizes: int) -> Parts:
        return jax.tree.map(lambda leaf: lax.empty((*sizes, *leaf.shape), leaf.dtype), shapes)

    def one_turn(index: jax.Array, held: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
        levels, total = held[0], turn(index)
        if num_levels == 0:
            return levels, total

        # As in binary counting: the sums in the lower levels are added to the sum that is carried.
        def carry(level: jax.Array, total: Parts) -> Parts:
            return added(jax.tree.map(lambda rows: _row(rows, level), levels), total)

        num_ones = lax.population_count(index ^ (index + 1)) - 1
        with jax.named_scope("carry"):  # by this name `hlo.py` knows how often the loop runs
            total = lax.fori_loop(0, num_ones, carry, total)
        # The last turn's total is the result; it is also written over a level that is not needed any more.
        return jax.tree.map(lambda rows, row: _with_row(rows, row, num_ones), levels, total), total

    return _loop(num_turns, not_negative, one_turn, (unset(num_levels), unset()))[1]


def _row(rows: jax.Array, index: jax.Array) -> jax.Array:
    # Without a choice for negative numbers, so that where there is a sum, there is nothing but a sum.
    return lax.dynamic_index_in_dim(rows, index, keepdims=False, allow_negative_indices=False)


def _with_row(rows: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(rows, row, index, 0, allow_negative_indices=False)


def stack_of_turns(turn: Callable[[jax.Array], Arrays], num_turns: int, not_negative: jax.Array) -> Arrays:
    """The results of `turn(index)` for index 0 to `num_turns - 1`, stacked along a new first axis."""
    turn = jax.jit(turn, inline=True)
    shapes = jax.eval_shape(turn, _AN_INDEX)
    unset = {name: lax.empty((num_turns, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}

    def one_turn(index: jax.Array, held: Arrays) -> Arrays:
        found = turn(index)
        return {name: lax.dynamic_update_index_in_dim(held[name], found[name], index, 0) for name in held}

    return _loop(num_turns, not_negative, one_turn, unset)
