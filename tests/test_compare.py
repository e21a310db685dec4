"""Whether two compiled programs do the same arithmetic: programs that the compiler for CPUs made."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.parallel.reduce import Part
from nfnet_flax.parallel.turns import bound_to_turn, sum_of_turns
from nfnet_flax.programs.compare import Comparison, compare, compare_topologies
from nfnet_flax.recipe_file import load_recipe
from tests import runs


def program(num_turns: int, function: Callable[[jax.Array], jax.Array] = jnp.tanh, scale: float = 2.0) -> str:
    """A compiled program with a loop as a training step has it, and something after it."""

    def step(rows: jax.Array, weights: jax.Array, not_negative: jax.Array) -> jax.Array:
        def turn(index: jax.Array) -> dict[str, Part]:
            held = bound_to_turn((rows[index], weights), index)
            return {"x": Part(function(held[0] @ held[1]) * scale)}

        total = sum_of_turns(turn, num_turns, not_negative)["x"].value
        return jnp.exp(total) + total * total

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((num_turns, 16, 8), (8, 8), ())]
    text = jax.jit(step).lower(*shapes).compile().as_text()
    assert text is not None
    return text


def by_source(first: str, second: str) -> dict[str, Comparison]:
    return {found.source.rsplit("/", 1)[-1]: found for found in compare(first, second)}


@pytest.mark.parametrize("num_turns", [1, 2, 8])
def test_the_number_of_turns_changes_no_arithmetic(num_turns: int) -> None:
    found = by_source(program(4), program(num_turns))
    assert set(found) == {"turns", "outside of loops"}
    assert all(each.is_equal for each in found.values()), found
    assert found["turns"].num_equal >= 2  # a product of matrices, and tanh with a multiplication
    assert found["outside of loops"].num_equal >= 1


def test_other_arithmetic_in_a_loop_is_found() -> None:
    found = by_source(program(4), program(4, jnp.sin))["turns"]
    assert not found.is_equal
    assert len(found.only_first) == len(found.only_second) == 1
    assert "tanh" in found.only_first[0]
    assert "sin" in found.only_second[0]


def test_another_constant_is_found() -> None:
    found = by_source(program(4), program(4, scale=3.0))["turns"]
    assert len(found.only_first) == len(found.only_second) == 1
    assert "constant(2)" in found.only_first[0]
    assert "constant(3)" in found.only_second[0]


def test_other_tiles_are_told_from_other_operations() -> None:
    text = program(2)
    line = next(line for line in text.splitlines() if " dot(" in line and "turns_2" in line)

    def with_tiles(size: int) -> str:
        tiles = f', backend_config={{"kernel_window_bounds":["{size}","8"]}}'
        return text.replace(line, line + tiles)

    found = by_source(with_tiles(4), with_tiles(8))["turns"]
    assert (len(found.other_sums), found.only_first, found.only_second) == (1, (), ())
    assert not found.is_equal
    assert by_source(with_tiles(4), with_tiles(4))["turns"].is_equal


def test_what_cannot_be_compared_is_refused() -> None:
    recipe = load_recipe(runs.DIGITS)
    with pytest.raises(ConfigError, match="at least two topologies"):
        compare_topologies(recipe, ["v5e:2x4"])
    fast = dataclasses.replace(recipe, execution=dataclasses.replace(recipe.execution, reproducible=False))
    with pytest.raises(ConfigError, match="reproducible = False: only sums in a fixed order"):
        compare_topologies(fast, ["v5e:2x4", "v5e:2x4/4"])
