"""Times what a training step on a CPU cannot do without: its convolutions alone, and its passes over memory alone.

`pip install -e .[bench]`, then `JAX_PLATFORMS=cpu python tools/bench_floor.py [--model nfnet_f0 --batch 8]`. Each
different convolution of the network is timed by itself, forward and both gradients, as this package computes it with
XLA and as PyTorch does with oneDNN; the sums count each as often as the network has it. The update reads a
parameter, its gradient, its momentum and its average, and writes all but the gradient: a program that only does this
with arrays of the same size is the floor of the update.
"""

import argparse
import collections
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import torch
from flax import nnx

import nfnet_flax
from nfnet_flax.models.convolution import conv2d, library_convolutions
from nfnet_flax.models.params import merge, split
from nfnet_flax.runtime import keep_freed_memory
from tools.bench_step import Run, timed


class Convolution(NamedTuple):
    """What determines the work of a convolution with SAME padding."""

    batch: int
    size: int
    """Height and width of the input, in pixels."""
    window: int
    channels: int
    features: int
    groups: int
    stride: int


def convolutions(model: nnx.Module, batch: int, size: int) -> collections.Counter[Convolution]:
    """The convolutions of a network's forward pass, and how often it has each of them."""
    graphdef, params, batch_stats = split(model)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    with library_convolutions():
        traced = jax.make_jaxpr(lambda params, images: merge(graphdef, params, batch_stats)(images))(params, images)
    return collections.Counter(_found(traced.jaxpr))


def _found(jaxpr: Any) -> Iterator[Convolution]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            x, kernel = (variable.aval.shape for variable in equation.invars)
            groups, stride = equation.params["feature_group_count"], equation.params["window_strides"][0]
            yield Convolution(x[0], x[1], kernel[0], x[3], kernel[3], groups, stride)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _found(inner)


def ours(case: Convolution) -> tuple[Run, Run]:
    """The forward pass and both gradients, as this package computes them."""
    keys = iter(jax.random.split(jax.random.key(0), 3))
    x = jax.random.normal(next(keys), (case.batch, case.size, case.size, case.channels))
    kernel = jax.random.normal(next(keys), (case.window, case.window, case.channels // case.groups, case.features))

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv2d(x, kernel, stride=case.stride, groups=case.groups)

    run_forward = jax.jit(forward)
    dy = jax.random.normal(next(keys), run_forward(x, kernel).shape)
    run_backward = jax.jit(lambda x, kernel, dy: jax.vjp(forward, x, kernel)[1](dy))
    return (
        lambda: jax.block_until_ready(run_forward(x, kernel)),
        lambda: jax.block_until_ready(run_backward(x, kernel, dy)),
    )


def theirs(case: Convolution) -> tuple[Run, Run]:
    """The same by PyTorch, in the layout that timm has on CPUs."""
    x = torch.randn(case.batch, case.channels, case.size, case.size, requires_grad=True)
    kernel = torch.randn(case.features, case.channels // case.groups, case.window, case.window, requires_grad=True)
    padding = case.window // 2
    y = torch.nn.functional.conv2d(x, kernel, stride=case.stride, padding=padding, groups=case.groups)
    dy = torch.randn_like(y)

    def run_forward() -> None:
        with torch.inference_mode():
            torch.nn.functional.conv2d(x, kernel, stride=case.stride, padding=padding, groups=case.groups)

    return run_forward, lambda: torch.autograd.grad(y, (x, kernel), dy, retain_graph=True)


def update(num_parameters: int) -> Run:
    """Reads four arrays of the size of the parameters and writes three."""
    arrays = [jnp.full((num_parameters,), value) for value in (0.1, 0.2, 0.3, 0.4)]

    def passes(parameter: Any, gradient: Any, momentum: Any, average: Any) -> Any:
        momentum = 0.9 * momentum + gradient
        parameter = parameter - 0.1 * momentum
        return parameter, momentum, average + 0.1 * (parameter - average)

    compiled = jax.jit(passes, donate_argnums=(0, 2, 3)).lower(*arrays).compile()
    held = [arrays[0], arrays[2], arrays[3]]

    def run() -> None:
        held[:] = jax.block_until_ready(compiled(held[0], arrays[1], held[1], held[2]))

    return run


def milliseconds(runs: list[Run], rounds: int) -> list[float]:
    """Median of each, one after the other: PyTorch's threads wait for their next work by computing, for a while."""
    found = []
    for run in runs:
        time.sleep(0.1)  # until those threads sleep
        run()  # warm
        found.append(1e3 * statistics.median(timed(run) for _ in range(rounds)))
    return found


def main() -> None:
    """Prints a line for each kind of convolution, the sums, and the update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f0", help="one of `nfnet models`")
    parser.add_argument("--batch", type=int, default=8, help="number of images")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed runs of each")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(os.cpu_count() or 1)
    print(
        f"{options.model}, batch {options.batch}, {options.size} px, float32; JAX {jax.__version__}, "
        f"PyTorch {torch.__version__}; ms: ours forward, gradients; PyTorch's forward, gradients"
    )
    model = nnx.eval_shape(lambda: nfnet_flax.create_model(options.model, rngs=nnx.Rngs(0)))
    model.eval()
    sums = [0.0] * 4
    flops = 0.0
    for case, count in convolutions(model, options.batch, options.size).items():
        found = milliseconds([*ours(case), *theirs(case)], options.rounds)
        sums = [total + count * each for total, each in zip(sums, found, strict=True)]
        outputs = case.batch * (-(-case.size // case.stride)) ** 2 * case.features
        flops += count * 2.0 * outputs * case.window**2 * case.channels / case.groups
        place = f"{case.size} px {case.window}x{case.window}/{case.stride} {case.channels} -> {case.features}"
        print(
            f"{count:3} x {place + f' groups {case.groups}':<44}" + "".join(f"{each:9.1f}" for each in found),
            flush=True,
        )
    print(f"{'all convolutions':<50}" + "".join(f"{each:9.1f}" for each in sums))
    rates = [flops / sums[0], 2 * flops / sums[1], flops / sums[2], 2 * flops / sums[3]]
    print(f"{'GFLOP/s':<50}" + "".join(f"{each / 1e6:9.0f}" for each in rates))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(split(model)[1]))
    (update_ms,) = milliseconds([update(num_parameters)], options.rounds)
    gb_per_s = 7 * 4 * num_parameters / update_ms / 1e6
    print(f"update of {num_parameters:,} parameters, 4 reads and 3 writes: {update_ms:.0f} ms, {gb_per_s:.1f} GB/s")


if __name__ == "__main__":
    main()
