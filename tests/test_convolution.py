"""Convolution and pooling against the library's, or a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nfnet_flax.models import convolution


def relative(got: jax.Array, want: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want)))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("size", [4, 5])
def test_avg_pool_counts_what_lies_inside(size: int, platform: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, size, size, 2), np.float32)
    with convolution.for_platform(platform):
        got = np.asarray(convolution.avg_pool_2x2(jnp.asarray(x)))
    for row in range(got.shape[1]):
        for column in range(got.shape[2]):
            window = x[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert got[0, row, column] == pytest.approx(window.mean(axis=(0, 1)), abs=1e-6)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(
    ("window", "stride", "groups", "is_symmetric"),
    [
        *(
            (1, 1, 1, False),
            (1, 2, 1, False),
            (1, 2, 3, False),
            (5, 3, 1, False),
            (3, 1, 1, False),
            (3, 2, 1, False),
            (3, 2, 3, False),
            (3, 1, 3, False),
        ),
        *((3, 2, 6, False), (5, 1, 6, False), (3, 2, 1, True), (3, 2, 3, True), (3, 2, 6, True), (7, 2, 1, True)),
    ],
)
def test_convolution_and_gradients_equal_the_librarys(
    size: int, window: int, stride: int, groups: int, is_symmetric: bool
) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, size, size, 6), np.float32))
    out = 6 if groups == 6 else 9  # six groups: depthwise
    kernel = jnp.asarray(rng.standard_normal((window, window, 6 // groups, out), np.float32))

    def library(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        padding = [(window // 2, window // 2)] * 2 if is_symmetric else "SAME"
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
        )

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with convolution.for_platform("cpu"):
            return convolution.conv2d(x, kernel, stride=stride, groups=groups, is_symmetric=is_symmetric)

    want, want_vjp = jax.vjp(library, x, kernel)
    got, got_vjp = jax.vjp(ours, x, kernel)
    cotangent = jnp.asarray(rng.standard_normal(want.shape, np.float32))
    for mine, theirs in zip((got, *got_vjp(cotangent)), (want, *want_vjp(cotangent)), strict=True):
        assert relative(mine, np.asarray(theirs)) < 1e-5
