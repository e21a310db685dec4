"""Products are rounded before anything is added to them, whatever they are compiled with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nfnet_flax.parallel.rounding import separately_rounded

Arrays = list[Any]


def rounded(function: Callable[..., Any], step: jax.Array) -> Callable[..., Any]:
    return separately_rounded(function, lambda *_: step, "cpu")


def of_products(np: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * b + c * d - np.square(a) * b


def of_powers_and_quotients(np: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return (a**2 + b / c) - np.float32(3.0) / (np.abs(c) + np.float32(1.0)) + d


def of_roots(np: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    inverse = lax.rsqrt(np.abs(b)) if np is jnp else np.float32(1.0) / np.sqrt(np.abs(b))
    return a * inverse + c * d


def of_inner_functions(np: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    chosen = np.where(a > b, a * b, c * d)  # for JAX, a function within the function
    if np is jnp:
        return lax.cond(jnp.sum(a) > 1e9, lambda x, y: x + y, lambda x, y: x * y + chosen, c, d)
    return c * d + chosen


@pytest.mark.parametrize("function", [of_products, of_powers_and_quotients, of_roots, of_inner_functions])
@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (3, 3, 1, 4), (7,), (64, 64), ()])
def test_each_product_is_rounded_by_itself(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    arrays = [np.asarray(rng.standard_normal(shape), np.float32) for _ in range(4)]

    @jax.jit
    def step(step: jax.Array, arrays: Arrays) -> jax.Array:
        found: jax.Array = rounded(lambda arrays: function(jnp, *arrays), step)(arrays)
        return found

    for count in (0, 112_600):
        got = np.asarray(step(jnp.int32(count), arrays))
        np.testing.assert_array_equal(got, function(np, *arrays), strict=True)


def test_bodies_of_loops_and_whole_numbers_stay_as_they_are() -> None:
    def function(x: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.fori_loop(0, 3, lambda _, value: value * x + 1.0, x), n * n

    text = str(jax.make_jaxpr(rounded(function, jnp.int32(0)))(jnp.ones(4), jnp.int32(5)))
    assert "scan[" in text or "while[" in text
    assert " max " not in text
    got, square = jax.jit(rounded(function, jnp.int32(0)))(jnp.full(4, 2.0), jnp.int32(5))
    np.testing.assert_array_equal(got, np.full(4, 23.0, np.float32))
    assert (int(square), square.dtype) == (25, jnp.int32)


def test_on_tpus_nothing_is_changed() -> None:
    assert separately_rounded(of_products, lambda *_: jnp.int32(0), "tpu") is of_products


def test_what_is_not_finite_is_seen_and_the_structure_kept() -> None:
    def function(tree: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
        return {name: (value * value, value) for name, value in tree.items()}

    given = {"b": jnp.asarray([1.0, jnp.nan, jnp.inf, -jnp.inf]), "a": jnp.zeros(())}
    found = rounded(function, jnp.int32(4))(given)
    np.testing.assert_array_equal(found["b"][0], [1.0, jnp.nan, jnp.inf, jnp.inf])
    assert found["a"] == (0.0, 0.0)
