"""Compares the time of the convolutions in models/convolution.py for this device with the library's own convolution.

`python tools/bench_convolution.py [--repeats 5]` prints the milliseconds of the forward pass, and of the forward pass
with both gradients, for the kinds of convolution that the networks have; medians of alternating runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnet_flax.models.convolution import conv2d

# Batch, image px, channels, groups, stride, window; and the part of a network that has such a convolution.
CASES = (
    (8, 16, 128, 1, 1, 1, "1x1"),
    (8, 32, 64, 1, 1, 3, "plain 3x3 (stem)"),
    (8, 16, 768, 6, 1, 3, "NFNet stage 3"),
    (8, 16, 768, 6, 2, 3, "NFNet stage 3, stride 2"),
    (8, 24, 168, 21, 1, 3, "NF-RegNet-B0 stage 3"),
    (8, 28, 256, 32, 1, 3, "SE-ResNeXt-D-50 stage 2"),
    (8, 24, 240, 240, 1, 5, "EfficientNet-B0, depthwise"),
)
Convolution = Callable[..., jax.Array]


def library(x: jax.Array, kernel: jax.Array, *, stride: int, groups: int) -> jax.Array:
    """`lax.conv_general_dilated` with `feature_group_count`."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def compiled(function: Convolution, x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> tuple[Any, Any]:
    """The compiled convolution, and the compiled convolution with both gradients."""

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return function(x, kernel, stride=stride, groups=groups)

    def both(x: jax.Array, kernel: jax.Array) -> Any:
        y, vjp = jax.vjp(forward, x, kernel)
        return vjp(jnp.cos(y))  # a cotangent that cannot be folded away

    return jax.jit(forward).lower(x, kernel).compile(), jax.jit(both).lower(x, kernel).compile()


def milliseconds(run: Any, x: jax.Array, kernel: jax.Array) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    jax.block_until_ready(run(x, kernel))
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="number of timed runs of each")
    repeats = parser.parse_args().repeats
    print(f"device: {jax.devices()[0].device_kind}, JAX {jax.__version__}, float32; ms, library / ours")
    for batch, size, channels, groups, stride, window, label in CASES:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((batch, size, size, channels), np.float32))
        kernel = jnp.asarray(rng.standard_normal((window, window, channels // groups, channels), np.float32))
        runs = [compiled(function, x, kernel, stride, groups) for function in (library, conv2d)]
        cells = []
        for kind in (0, 1):
            times: tuple[list[float], list[float]] = ([], [])
            for repeat in range(repeats + 1):
                for which in (0, 1):
                    spent = milliseconds(runs[which][kind], x, kernel)
                    if repeat:  # the first one warms up
                        times[which].append(spent)
            theirs, ours = (statistics.median(values) for values in times)
            cells.append(f"{theirs:9.1f} / {ours:6.1f} = {theirs / ours:6.1f}x")
        print(f"{label:<28}forward {cells[0]}   with gradients {cells[1]}", flush=True)


if __name__ == "__main__":
    main()
