"""Compiles a recipe's training step for a TPU, without having one, and reports memory, collectives, FLOPs and time.

libtpu contains the real compiler, which runs on any x86 machine. Its memory figures are exact, and so are collectives
and FLOPs, which are counted in its program. Its cycles are an estimate, which is useful for ratios within one version.
"""

import collections
import dataclasses
import math
import os
import time
from typing import TYPE_CHECKING, Any

from nfnet_flax.config import ConfigError
from nfnet_flax.programs.hlo import collective_bytes, estimated_cycles, flops, parse
from nfnet_flax.progress import COMPUTING_LINE_S, tracking
from nfnet_flax.recipe import Recipe
from nfnet_flax.units import duration, human_size, scaled

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from nfnet_flax.training.state import TrainState

# For each kind of device: HBM in GiB, and the clock in GHz if it follows from the published peak.
_DEVICES: dict[str, tuple[float, float | None]] = {
    "TPU v2": (8, 0.70),
    "TPU v3": (16, 0.94),
    "TPU v4": (32, 1.05),
    "TPU v5 lite": (16, 1.50),
    "TPU v5": (95, 1.75),
    "TPU v6 lite": (32, None),
    "TPU7x": (96, None),
}
_CHIP_CONFIGS = {"v4": "megacore"}
"""Kind of chip -> libtpu's name of the configuration that JAX uses on it, where it is not libtpu's default: on a v4 the
two cores of a chip are one device, with all of its memory."""
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock protects a chip, and there is none
}
_NUM_EXAMPLES = 1_281_167
"""Number of training images of ImageNet; only the schedule depends on it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler reports about one training step, per device."""

    topology: str
    device_kind: str
    num_devices: int
    images_per_device: int
    """Number of images per device; with `spatial`, of a group of devices, each of which has a part of their height."""
    images_per_turn: int
    """Number of these images that are computed at a time: a part of the batch."""
    batch_size: int
    image_size: int
    rematerialization: str
    num_parameters: int
    parameter_bytes: int
    """Size of a device's share of parameters and running statistics."""
    state_bytes: int
    """Size of a device's share of parameters, optimizer state and EMA together."""
    temporary_bytes: int
    """Size of activations, gradients and other arrays that exist only within a step."""
    peak_bytes: int
    hbm_bytes: int
    flops: float
    """FLOPs of the convolutions and matrix products of one step."""
    collectives: dict[str, int]
    """Kind of collective -> payload of one step in bytes."""
    cycles: int
    """The compiler's estimate of the cycles of one step."""
    clock_hz: float | None
    """Clock of the device; None: not known."""
    most_expensive: list[tuple[str, int]]
    """The most expensive operations, by their source in the traced program, and their estimated cycles."""
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the device's memory."""
        return self.peak_bytes <= self.hbm_bytes


def set_environment() -> None:
    """Sets the environment variables that libtpu needs where there is no TPU; call it before JAX is imported."""
    os.environ.update(_ENVIRONMENT)


def plan(recipe: Recipe, topology: str, *, num_operations: int = 10) -> Plan:
    """Compiles the training step of a recipe for a topology such as `v5e:2x4`.

    Raises:
      ConfigError: libtpu is missing or does not know the topology, or the batch cannot be divided over it.
    """
    mesh = mesh_of(recipe, topology)
    started = time.perf_counter()
    state, compiled = compile_step(recipe, topology, mesh)
    return _report(recipe, topology, mesh, state, compiled, time.perf_counter() - started, num_operations)


def mesh_of(recipe: Recipe, topology: str) -> "Mesh":
    """The devices of a topology as a mesh for a recipe; raises `ConfigError` as `devices_of` and `make_mesh` do."""
    from nfnet_flax.parallel.mesh import make_mesh

    return make_mesh(devices_of(topology), fsdp=recipe.execution.fsdp, spatial=recipe.execution.spatial)


def compile_step(recipe: Recipe, topology: str, mesh: "Mesh") -> "tuple[TrainState, jax.stages.Compiled]":
    """The compiled training step of a recipe on the mesh of a topology, and the shapes of its state; raises
    `ConfigError` as `plan` does."""
    import jax

    try:
        state, lowered = lower_step(recipe, mesh)
        with tracking(f"compiling the step for {topology}", first_line_s=COMPUTING_LINE_S):
            return state, lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"the step does not compile for {topology}: {str(error).splitlines()[0]}") from error


def lower_step(recipe: Recipe, mesh: "Mesh") -> "tuple[TrainState, jax.stages.Lowered]":
    """The training step of a recipe on a mesh, ready to be compiled, and the shapes of its state. No memory of the
    devices is allocated, and no images are opened.

    Raises:
      ConfigError: the batch cannot be divided over the mesh, or the objective's arrays (a teacher) cannot be read.
    """
    import jax
    import jax.numpy as jnp

    from nfnet_flax.objectives import RunFacts
    from nfnet_flax.parallel.mesh import batch_sharding, replicated
    from nfnet_flax.training.build import build_optimizer, build_structure
    from nfnet_flax.training.state import abstract_state
    from nfnet_flax.training.step import make_train_step

    batch_size, size = recipe.data.batch_size, recipe.data.image_size
    structure = build_structure(recipe, mesh)
    optimizer = build_optimizer(recipe, structure, _NUM_EXAMPLES)
    state = abstract_state(structure, optimizer, mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8, sharding=batch_sharding(mesh, 4)),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=batch_sharding(mesh)),
    }
    if recipe.data.source.is_multi_label:
        rows = (batch_size, recipe.num_classes)
        batch |= {"label": jax.ShapeDtypeStruct(rows, jnp.uint8, sharding=batch_sharding(mesh, 2))}
    facts = RunFacts(class_names=(), mean=recipe.data.mean, std=recipe.data.std)
    arrays = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=replicated(mesh))
        for name, value in recipe.objective.arrays(facts).items()
    }
    step = make_train_step(structure, optimizer, recipe.objective, mesh, seed=recipe.seed, reduction=recipe.reduction)
    return state, step.lower(state, batch, arrays)


def _report(
    recipe: Recipe,
    topology: str,
    mesh: "jax.sharding.Mesh",
    state: "TrainState",
    compiled: "jax.stages.Compiled",
    compile_s: float,
    num_operations: int,
) -> Plan:
    import jax

    from nfnet_flax.parallel.mesh import count_turns, num_batch_shards

    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise ConfigError(f"the compiler for {topology} does not show the compiled program: install another libtpu")
    program = parse(text)
    cycles, by_source = estimated_cycles(program)
    device = mesh.devices.flat[0]
    hbm_gib, clock_ghz = _DEVICES.get(device.device_kind, (0, None))

    def nbytes(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    written = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        topology=topology,
        device_kind=device.device_kind,
        num_devices=mesh.size,
        images_per_device=recipe.data.batch_size // num_batch_shards(mesh),
        images_per_turn=recipe.data.batch_size
        // num_batch_shards(mesh)
        // count_turns(recipe.execution.num_microbatches, mesh),
        batch_size=recipe.data.batch_size,
        image_size=recipe.data.image_size,
        rematerialization=recipe.execution.rematerialization,
        num_parameters=sum(leaf.size for leaf in state.params.values()),
        parameter_bytes=nbytes((state.params, state.batch_stats)),
        state_bytes=nbytes(state),
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + written
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        hbm_bytes=int(hbm_gib * 2**30),
        flops=float(flops(program)),
        collectives=collective_bytes(program),
        cycles=cycles,
        clock_hz=None if clock_ghz is None else 1e9 * clock_ghz,
        most_expensive=collections.Counter(by_source).most_common(num_operations),
        compile_s=compile_s,
    )


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, as the compiler describes them, ordered by process as in a run. With `/N` at the end
    of the name, the first N of them.

    Raises:
      ConfigError: libtpu is missing, or does not know the topology.
    """
    from jax.experimental import topologies

    whole, _, number = topology.partition("/")
    config = _CHIP_CONFIGS.get(whole.partition(":")[0])
    options = {} if config is None else {"chip_config_name": config}
    try:
        described: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=whole, **options).devices
        found = sorted(described, key=lambda device: device.process_index)
    except Exception as error:  # libtpu's own errors have no common class
        raise ConfigError(
            f"topology {topology!r}: {str(error).splitlines()[0]}. This needs libtpu (pip install 'nfnet_flax[tpu]') "
            "and a name such as v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1 or v6e:2x4"
        ) from error
    if not number:
        return found
    if not number.isdecimal() or not 1 <= int(number) <= len(found):
        raise ConfigError(f"topology {topology!r}: after the slash give a number of chips from 1 to {len(found)}")
    return found[: int(number)]


def describe(found: Plan) -> str:
    """A plan as text for people."""
    lines = [
        f"{found.topology}: {found.num_devices} x {found.device_kind}, {found.images_per_device} images of "
        f"{found.image_size} px each, {found.images_per_turn} at a time; rematerialization {found.rematerialization}; "
        f"compiled in {found.compile_s:.0f} s",
        f"memory per device: parameters {human_size(found.parameter_bytes)}, optimizer and EMA "
        f"{human_size(found.state_bytes - found.parameter_bytes)}, within the step {human_size(found.temporary_bytes)}",
        f"  peak {human_size(found.peak_bytes)} of {human_size(found.hbm_bytes)}: "
        f"{'fits' if found.fits else 'DOES NOT FIT'}",
        f"FLOPs per device and step: {scaled(found.flops)}",
        *(
            f"{kind}: {scaled(size)}B per device and step ({size / (4 * found.num_parameters):.2f} x the gradient)"
            for kind, size in found.collectives.items()
        ),
        f"estimated: {scaled(found.cycles)} cycles",
    ]
    if found.clock_hz is not None:
        seconds = found.cycles / found.clock_hz
        rate = found.batch_size / seconds
        lines[-1] += f" = {duration(seconds)} at {found.clock_hz / 1e9:.2f} GHz, {rate:.0f} images/s"
    lines.append("most expensive operations (estimated cycles):")
    lines += [f"  {scaled(cycles):>7}  {source}" for source, cycles in found.most_expensive]
    return "\n".join(lines)
