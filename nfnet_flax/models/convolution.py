"""How a convolution and an average pool are computed on each kind of device; only this file decides it.

All convolutions are NHWC with HWIO kernels. On GPU and TPU the library's convolution is used as it is,
and its windowed sum for the pool (by the TPU compiler's estimate it takes half the time of a reshape and a sum, forward
and backward together). XLA's CPU compiler has six weaknesses that cost factors of 2 to 400
(`python tools/bench_convolution.py`):

- the gradient of a grouped convolution is slow generic code, so groups are computed as separate plain convolutions;
- a depthwise convolution and its gradient are slow generic code, so it is computed as a sum of shifted products;
- inside a loop the compiler cannot change the layouts of a convolution's gradient, so both gradients are written here
  as ordinary NHWC/HWIO convolutions with explicit transposes;
- a 1x1 convolution is slower than the equivalent matrix product;
- the kernel gradient of such a product, as JAX derives it, sums over the first axis of both arrays, which is slow code,
  so it is written here as a sum over three axes, for which the compiler transposes an array first;
- the input gradient of a convolution with a stride multiplies the zeros between the pixels of the output gradient, so
  each phase (the pixels of the input with the same remainder by the stride) is a convolution of its own without them.
"""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("convolution_platform", default=None)
_library_convolutions: contextvars.ContextVar[bool] = contextvars.ContextVar("library_convolutions", default=False)


@contextlib.contextmanager
def for_platform(platform: str) -> Iterator[None]:
    """Within the context, convolutions are traced for `platform` ("cpu", "gpu" or "tpu"), not the default backend."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


@contextlib.contextmanager
def library_convolutions() -> Iterator[None]:
    """Within the context, convolutions are the library's on every device, as a reference for benchmarks."""
    token = _library_convolutions.set(True)
    try:
        yield
    finally:
        _library_convolutions.reset(token)


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, groups: int = 1, is_symmetric: bool = False
) -> jax.Array:
    """2-D convolution with padding.

    Args:
      x: (N, H, W, I) images.
      kernel: (kh, kw, I / groups, O), with the same dtype as `x`.
      stride: stride of both spatial axes.
      groups: number of feature groups; it must divide I and O.
      is_symmetric: padding by half of the window on each side, as PyTorch's networks have it, instead of SAME padding.
        They differ if the stride is 2: SAME padding of an even size is one pixel more at the end.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), O), with the dtype of `x`.
    """
    if not _is_for_cpu():
        padding = _paddings(x, kernel, stride, is_symmetric)
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=_DIMENSIONS, feature_group_count=groups
        )
    if groups > 1 and groups == x.shape[3] == kernel.shape[3]:
        return _depthwise_by_shifts(x, kernel, stride, is_symmetric)
    if groups > 1:
        parts = zip(jnp.split(x, groups, axis=3), jnp.split(kernel, groups, axis=3), strict=True)
        return jnp.concatenate([_conv_loop_safe(part, k, stride, is_symmetric) for part, k in parts], axis=3)
    if kernel.shape[:2] == (1, 1):
        return _product(x[:, ::stride, ::stride], kernel[0, 0])
    return _conv_loop_safe(x, kernel, stride, is_symmetric)


def avg_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 average pool with stride 2 and SAME padding; a window over the border averages only the pixels inside."""
    batch, height, width, channels = x.shape
    rows = jnp.full((-(-height // 2), 1, 1), 2, x.dtype).at[-1].add(-(height % 2))
    columns = jnp.full((-(-width // 2), 1), 2, x.dtype).at[-1].add(-(width % 2))
    if _is_for_cpu():
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        total = x.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels).sum(axis=(2, 4))
    else:
        zero = np.zeros((), x.dtype)[()]
        total = lax.reduce_window(x, zero, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return total / (rows * columns)


def _is_for_cpu() -> bool:
    return not _library_convolutions.get() and (_platform.get() or jax.default_backend()) == "cpu"


def _depthwise_by_shifts(x: jax.Array, kernel: jax.Array, stride: int, is_symmetric: bool) -> jax.Array:
    window = kernel.shape[:2]
    padding = _paddings(x, kernel, stride, is_symmetric)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    spans = [(size - extent) // stride * stride + 1 for size, extent in zip(x.shape[1:3], window, strict=True)]
    total: jax.Array | None = None
    for row, column in itertools.product(range(window[0]), range(window[1])):
        shifted = x[:, row : row + spans[0] : stride, column : column + spans[1] : stride]
        term = shifted * kernel[row, column, 0]
        total = term if total is None else total + term
    assert total is not None
    return total


def _paddings(x: jax.Array, kernel: jax.Array, stride: int, is_symmetric: bool) -> list[tuple[int, int]]:
    """(low, high) padding of height and width."""
    if is_symmetric:
        return [(extent // 2, extent // 2) for extent in kernel.shape[:2]]
    return [same_padding(size, extent, stride) for size, extent in zip(x.shape[1:3], kernel.shape[:2], strict=True)]


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """(low, high) SAME padding of one axis, as XLA defines it."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 1x1 convolution of (N, H, W, I) images with an (I, O) kernel."""
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _product_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    pixels = (0, 1, 2)
    dx = lax.dot_general(dy, kernel, (((3,), (1,)), ((), ())))
    return dx, lax.dot_general(x, dy, ((pixels, pixels), ((), ())))


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_loop_safe(x: jax.Array, kernel: jax.Array, stride: int, is_symmetric: bool) -> jax.Array:
    padding = _paddings(x, kernel, stride, is_symmetric)
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_DIMENSIONS)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, is_symmetric: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv_loop_safe(x, kernel, stride, is_symmetric), (x, kernel)


def _backward(
    stride: int, is_symmetric: bool, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    spatial = tuple(zip(x.shape[1:3], kernel.shape[:2], dy.shape[1:3], strict=True))
    low = [before for before, _ in _paddings(x, kernel, stride, is_symmetric)]

    dx = _input_gradient(dy, kernel, x.shape[1:3], low, stride)

    # Kernel gradient: a convolution with channels as batch, the batch as channels, the output gradient as dilated
    # kernel.
    padding = []
    for (size, window, out), pad_low in zip(spatial, low, strict=True):
        padding.append((pad_low, window - 1 + (out - 1) * stride + 1 - size - pad_low))
    dk = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        padding,
        rhs_dilation=(stride, stride),
        dimension_numbers=_DIMENSIONS,
    )
    return dx, dk.transpose(1, 2, 0, 3)


_conv_loop_safe.defvjp(_forward, _backward)


def _input_gradient(
    dy: jax.Array, kernel: jax.Array, size: Sequence[int], low: Sequence[int], stride: int
) -> jax.Array:
    """The gradient of a convolution with respect to its input.

    Args:
      dy: (N, h, w, O) gradient of the output.
      kernel: (kh, kw, I, O).
      size: height and width of the input.
      low: padding before the first pixel, of height and width.
      stride: stride of both spatial axes.
    """
    # The kernel, flipped and with input and output channels exchanged.
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    rows, columns = (
        [_phase(first, stride, *facts) for first in range(stride)]
        for facts in zip(size, kernel.shape[:2], dy.shape[1:3], low, strict=True)
    )

    def computed(row: _Phase, column: _Phase) -> jax.Array:
        taps = flipped[row.taps, column.taps]
        if taps.size == 0:  # a window smaller than the stride leaves pixels out
            return jnp.zeros((len(dy), row.size, column.size, kernel.shape[2]), dy.dtype)
        padding = (row.padding, column.padding)
        return lax.conv_general_dilated(dy, taps, (1, 1), padding, dimension_numbers=_DIMENSIONS)

    if stride == 1:
        return computed(rows[0], columns[0])
    # All phases have the size of the largest, so that their pixels can take turns; the rest is cut off.
    phases = jnp.stack([jnp.stack([computed(row, column) for column in columns], axis=3) for row in rows], axis=2)
    height, width = (stride * axis[0].size for axis in (rows, columns))
    return phases.reshape(len(dy), height, width, kernel.shape[2])[:, : size[0], : size[1]]


class _Phase(NamedTuple):
    """The pixels of an axis of the input that have the same remainder by the stride."""

    size: int
    """Number of pixels, of the first phase if this one has fewer."""
    taps: slice
    """The part of the flipped kernel that reaches them."""
    padding: tuple[int, int]
    """Padding of the output gradient."""


def _phase(first: int, stride: int, size: int, window: int, out: int, low: int) -> _Phase:
    """The phase of the pixels `first`, `first + stride`, ... of an axis.

    Tap t of the kernel leads from pixel r to the pixel (r + low - t) / stride of the output, if that is a whole number.

    Args:
      first: first pixel, below the stride.
      stride: stride of the convolution.
      size: number of pixels of the input.
      window: number of taps.
      out: number of pixels of the output.
      low: padding before the first pixel.
    """
    count = -(-size // stride)
    last_tap = window - 1 - (window - 1 - first - low) % stride  # the largest that reaches these pixels, or negative
    num_taps = last_tap // stride + 1
    before = -((first + low - last_tap) // stride)
    begin = window - 1 - last_tap
    return _Phase(count, slice(begin, window, stride), (before, count + num_taps - 1 - out - before))
