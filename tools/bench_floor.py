"""Times what a training step on a CPU cannot do without: its convolutions alone, and its passes over memory alone.

`pip install -e .[bench]`, then `JAX_PLATFORMS=cpu python tools/bench_floor.py [--model nfnet_f0 --batch 8]`. Each
different convolution of the network is timed by itself, forward and both gradients, as this package computes it with
XLA and as PyTorch does with oneDNN; the sums count each as often as the network has it. The update reads a
parameter, its gradient, its momentum and its average, and writes all but the gradient: a program that only does this
with arrays of the same size is the floor of the update. With `--parts`, the convolutions of as many parts of the batch
are timed, too, which have fewer images each.
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
from tools.figures import Row, write_figures


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


class Sums(NamedTuple):
    """Milliseconds of all convolutions of a network, or their GFLOP/s."""

    ours_forward: float
    ours_gradients: float
    theirs_forward: float
    theirs_gradients: float


def all_convolutions(model: nnx.Module, batch: int, size: int, rounds: int) -> tuple[Sums, Sums]:
    """Prints a line for each kind of convolution; returns the sums of milliseconds, and GFLOP/s."""
    sums, flops = [0.0] * 4, 0.0
    for case, count in convolutions(model, batch, size).items():
        found = milliseconds([*ours(case), *theirs(case)], rounds)
        sums = [total + count * each for total, each in zip(sums, found, strict=True)]
        outputs = case.batch * (-(-case.size // case.stride)) ** 2 * case.features
        flops += count * 2.0 * outputs * case.window**2 * case.channels / case.groups
        place = f"{case.size} px {case.window}x{case.window}/{case.stride} {case.channels} -> {case.features}"
        print(
            f"{count:3} x {place + f' groups {case.groups}':<44}" + "".join(f"{each:9.1f}" for each in found),
            flush=True,
        )
    print(f"{'all convolutions':<50}" + "".join(f"{each:9.1f}" for each in sums))
    rates = [passes * flops / total / 1e6 for passes, total in zip((1, 2, 1, 2), sums, strict=True)]
    print(f"{'GFLOP/s':<50}" + "".join(f"{each:9.0f}" for each in rates))
    return Sums(*sums), Sums(*rates)


def rows_of(num_parts: int, sums: Sums, rates: Sums) -> list[Row]:
    """Rows of a table: what a step that has its images in so many parts cannot do without."""
    ours, theirs = "ours, by XLA", "PyTorch, by oneDNN"
    where = "" if num_parts == 1 else f", in {num_parts} parts"

    def row(what: str, one: str, other: str) -> Row:
        return {"each alone": what + where, ours: one, theirs: other}

    def cell(ms: float, rate: float) -> str:
        return f"{num_parts * ms:.0f} ms ({rate:.0f} GFLOP/s)"

    both = (num_parts * (forward + backward) for forward, backward in (sums[:2], sums[2:]))
    return [
        row("all convolutions, forward", cell(sums[0], rates[0]), cell(sums[2], rates[2])),
        row("their gradients", cell(sums[1], rates[1]), cell(sums[3], rates[3])),
        row("both", *(f"{ms:.0f} ms" for ms in both)),
    ]


def main() -> None:
    """Prints the convolutions, in one part and in several, and the update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f0", help="one of `nfnet models`")
    parser.add_argument("--batch", type=int, default=8, help="number of images")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, in pixels")
    parser.add_argument("--parts", type=int, default=4, help="number of parts of a step in parts; it divides --batch")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed runs of each")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the sums there, as docs/figures/ has them"
    )
    options = parser.parse_args()
    if options.parts < 1 or options.batch % options.parts:
        parser.error(f"--parts {options.parts}: must divide --batch {options.batch}")
    keep_freed_memory()
    torch.set_num_threads(os.cpu_count() or 1)
    model = nnx.eval_shape(lambda: nfnet_flax.create_model(options.model, rngs=nnx.Rngs(0)))
    model.eval()
    rows: list[Row] = []
    for num_parts in sorted({1, options.parts}):
        batch = options.batch // num_parts
        print(
            f"{options.model}, batch {batch}, {options.size} px, float32; JAX {jax.__version__}, PyTorch "
            f"{torch.__version__}; ms: ours forward, gradients; PyTorch's forward, gradients"
        )
        rows += rows_of(num_parts, *all_convolutions(model, batch, options.size, options.rounds))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(split(model)[1]))
    (update_ms,) = milliseconds([update(num_parameters)], options.rounds)
    what, rate = (
        f"the update's 4 reads and 3 writes of {num_parameters:,} numbers",
        28 * num_parameters / update_ms / 1e6,
    )
    print(f"{what}: {update_ms:.0f} ms, {rate:.1f} GB/s")
    rows.append(dict(zip(rows[0], (what, f"{update_ms:.0f} ms ({rate:.1f} GB/s)", ""), strict=True)))
    if options.json:
        write_figures(options.json, rows)


if __name__ == "__main__":
    main()
