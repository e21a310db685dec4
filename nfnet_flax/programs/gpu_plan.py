"""Compiles a recipe's training step for GPUs, without having one, and reports what its program shows.

XLA's compiler for GPUs runs on any x86 machine. Its program shows what is computed, copied, and moved between devices.
It says nothing about time, and memory only in part, because convolutions and many matrix products are calls of
libraries, which choose their algorithms, and the memory that these need, on the GPU.
"""

import collections
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nfnet_flax.config import ConfigError
from nfnet_flax.programs.gpu import GpuKind, gpus_of, kind_of
from nfnet_flax.programs.hlo import collective_bytes, flops, parse
from nfnet_flax.programs.memory_traffic import Kernel, kernels_of
from nfnet_flax.programs.operations import size_of
from nfnet_flax.programs.step_plan import (
    StepSizes,
    compile_step,
    describe_collectives,
    describe_sizes,
    describe_state,
    sizes_of,
)
from nfnet_flax.recipe import Recipe
from nfnet_flax.units import duration, human_size, scaled

if TYPE_CHECKING:
    import jax

_PREALLOCATED = 0.75
"""Share of a GPU's memory that JAX takes at its start, unless the environment says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuPlan(StepSizes):
    """What the program of one training step shows, per device. Nothing of it was measured."""

    temporary_bytes: int
    """Size of activations, gradients and other arrays that exist only within a step, without the memory in which the
    libraries work."""
    least_bytes: int
    """Memory that the step needs at least."""
    memory_bytes: int
    """Memory of the device."""
    flops: float
    """FLOPs of the convolutions and matrix products of one step."""
    collectives: dict[str, int]
    """Kind of collective -> payload of one step in bytes."""
    turn_copies_bytes: int | None
    """Size of the copies in one turn of the loop over parts of the batch; None: there is no loop."""
    copies_bytes: int
    """Size of all copies of one step."""
    traffic_bytes: int
    """What the kernels of one step read and write, without any cache from one to the next."""
    flops_bound_s: float
    """Time that the FLOPs take at the published peak, in seconds."""
    traffic_bound_s: float
    """Time that reading and writing takes at the published bandwidth, in seconds."""
    kernels_bound_s: float
    """Sum over the kernels of the larger of these two times, in seconds."""
    largest: list[tuple[str, float]]
    """The kernels with the largest part of `kernels_bound_s`, by their source in the traced program."""


def plan_for_gpus(recipe: Recipe, topology: str, *, num_operations: int = 10) -> GpuPlan:
    """Compiles the training step of a recipe for GPUs, such as `h100:8`.

    Raises:
      ConfigError: the kind or number of the GPUs is not possible, a package is missing, or the batch cannot be divided.
    """
    from nfnet_flax.parallel.mesh import make_mesh

    kind = kind_of(topology)
    mesh = make_mesh(gpus_of(topology), fsdp=recipe.execution.fsdp, spatial=recipe.execution.spatial)
    started = time.perf_counter()
    state, compiled = compile_step(recipe, topology, mesh)
    sizes = sizes_of(recipe, topology, mesh, state, time.perf_counter() - started)
    return _report(kind, StepSizes(**sizes), compiled, num_operations)


def _report(kind: GpuKind, sizes: StepSizes, compiled: "jax.stages.Compiled", num_operations: int) -> GpuPlan:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise ConfigError(f"the compiler for {sizes.topology} does not show the compiled program: install another JAX")
    program = parse(text)
    kernels = kernels_of(program)
    copies = [kernel for kernel in kernels if kernel.is_copy]
    num_turns = max(kernel.num_turns for kernel in kernels)
    of_turns = [kernel for kernel in copies if kernel.num_turns]
    traffic = sum(kernel.times * kernel.num_bytes for kernel in kernels)
    total_flops = flops(program)
    bounds = _bounds(kind, kernels)
    return GpuPlan(
        **dataclasses.asdict(sizes),
        temporary_bytes=memory.temp_size_in_bytes,
        least_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        memory_bytes=kind.memory_bytes,
        flops=float(total_flops),
        collectives=collective_bytes(program),
        turn_copies_bytes=_size_of_all(of_turns) // num_turns if num_turns else None,
        copies_bytes=_size_of_all(copies),
        traffic_bytes=traffic,
        flops_bound_s=total_flops / kind.flops_per_s,
        traffic_bound_s=traffic / kind.bytes_per_s,
        kernels_bound_s=sum(bounds.values()),
        largest=sorted(bounds.items(), key=lambda pair: -pair[1])[:num_operations],
    )


def _size_of_all(kernels: Sequence[Kernel]) -> int:
    return sum(kernel.times * size_of(kernel.operation.result) for kernel in kernels)


def _bounds(kind: GpuKind, kernels: Sequence[Kernel]) -> dict[str, float]:
    """Source of kernels, and the shape of their result -> the sum of their bounds in seconds."""
    found: dict[str, float] = collections.defaultdict(float)
    for kernel in kernels:
        shape = re.sub(r"\{[^}]*\}", "", kernel.operation.result)
        source = re.sub(r"/block\d+/", "/block*/", kernel.operation.source)
        name = f"{source}  {shape if len(shape) < 60 else shape[:57] + '...'}"
        found[name] += kernel.times * max(kernel.flops / kind.flops_per_s, kernel.num_bytes / kind.bytes_per_s)
    return found


def describe_gpu_plan(found: GpuPlan) -> str:
    """A plan as text for people."""
    kind = kind_of(found.topology)
    gradient = 4 * found.num_parameters
    if found.least_bytes > found.memory_bytes:
        verdict = "DOES NOT FIT"
    elif found.least_bytes > _PREALLOCATED * found.memory_bytes:
        verdict = f"more than the {_PREALLOCATED:.0%} that JAX takes unless told otherwise"
    else:
        verdict = "whether it fits is not known, as the libraries need memory, too"
    share = f"{found.copies_bytes / gradient:.2f} x the gradient"
    copies = f"copies: {scaled(found.copies_bytes)}B per device and step ({share})"
    if found.turn_copies_bytes is not None:
        copies += f", {found.turn_copies_bytes / gradient:.2f} x the gradient in each turn over a part of the batch"
    lines = [
        describe_sizes(found),
        "nothing was run on a GPU: this is what the compiled program shows",
        f"{describe_state(found)}, within the step at least {human_size(found.temporary_bytes)}",
        f"  together at least {human_size(found.least_bytes)} of {human_size(found.memory_bytes)}: {verdict}",
        f"FLOPs per device and step: {scaled(found.flops)}",
        *describe_collectives(found, found.collectives),
        copies,
        f"bounds, not a time, at {scaled(kind.flops_per_s)}FLOP/s (bfloat16, dense) and {scaled(kind.bytes_per_s)}B/s "
        "as published, without communication:",
        f"  {duration(found.flops_bound_s):>9}  FLOPs",
        f"  {duration(found.traffic_bound_s):>9}  reading and writing {scaled(found.traffic_bytes)}B without a cache",
        f"  {duration(found.kernels_bound_s):>9}  the larger of both, kernel by kernel; the largest of these:",
    ]
    lines += [f"  {duration(seconds):>9}    {source}" for source, seconds in found.largest]
    return "\n".join(lines)
