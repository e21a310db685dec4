"""Compiles a recipe's training step for a TPU, without having one, and reports memory, collectives, FLOPs and time.

libtpu contains the real compiler, which runs on any x86 machine. Its memory figures are exact, and so are collectives
and FLOPs, which are counted in its program. Its cycles are an estimate, which is useful for ratios within one version.
"""

import collections
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

from nfnet_flax.config import ConfigError
from nfnet_flax.programs.gpu import names_gpus
from nfnet_flax.programs.hlo import collective_bytes, estimated_cycles, flops, parse
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
    "CUDA_VISIBLE_DEVICES": "-1",  # so that a program for GPUs is the same on a machine that has some
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(StepSizes):
    """What the compiler for TPUs reports about one training step, per device."""

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

    @property
    def fits(self) -> bool:
        """Whether the step fits into the device's memory."""
        return self.peak_bytes <= self.hbm_bytes


def set_environment() -> None:
    """Makes JAX compute on CPUs, and sets the variables that the compilers for TPUs and GPUs need where no such device
    is used; call it before JAX looks for devices."""
    os.environ.update(_ENVIRONMENT)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the variable is too late if JAX was imported before


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


def _report(
    recipe: Recipe,
    topology: str,
    mesh: "Mesh",
    state: "TrainState",
    compiled: "jax.stages.Compiled",
    compile_s: float,
    num_operations: int,
) -> Plan:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise ConfigError(f"the compiler for {topology} does not show the compiled program: install another libtpu")
    program = parse(text)
    cycles, by_source = estimated_cycles(program)
    device = mesh.devices.flat[0]
    hbm_gib, clock_ghz = _DEVICES.get(device.device_kind, (0, None))
    written = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        **sizes_of(recipe, topology, mesh, state, compile_s),
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
    )


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, as the compiler describes them, ordered by process as in a run. With `/N` at the end
    of the name, the first N of them.

    Raises:
      ConfigError: libtpu is missing, or does not know the topology, or it is one of GPUs.
    """
    from jax.experimental import topologies

    if names_gpus(topology):
        raise ConfigError(
            f"topology {topology!r}: give one of TPUs. The compiler for GPUs gives no estimate of a step's time; what "
            f"its program shows is printed by nfnet plan RECIPE --topology {topology}"
        )
    whole, _, number = topology.partition("/")
    config = _CHIP_CONFIGS.get(whole.partition(":")[0])
    options = {} if config is None else {"chip_config_name": config}
    try:
        described: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=whole, **options).devices
        found = sorted(described, key=lambda device: device.process_index)
    except Exception as error:  # libtpu's own errors have no common class
        raise ConfigError(
            f"topology {topology!r}: {str(error).splitlines()[0]}. This needs libtpu (pip install 'nfnet_flax[tpu]') "
            "and a name such as v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1 or v6e:2x4; GPUs are called h100:8 or a100:8"
        ) from error
    if not number:
        return found
    if not number.isdecimal() or not 1 <= int(number) <= len(found):
        raise ConfigError(f"topology {topology!r}: after the slash give a number of chips from 1 to {len(found)}")
    return found[: int(number)]


def describe(found: Plan) -> str:
    """A plan as text for people."""
    lines = [
        describe_sizes(found),
        f"{describe_state(found)}, within the step {human_size(found.temporary_bytes)}",
        f"  peak {human_size(found.peak_bytes)} of {human_size(found.hbm_bytes)}: "
        f"{'fits' if found.fits else 'DOES NOT FIT'}",
        f"FLOPs per device and step: {scaled(found.flops)}",
        *describe_collectives(found, found.collectives),
        f"estimated: {scaled(found.cycles)} cycles",
    ]
    if found.clock_hz is not None:
        seconds = found.cycles / found.clock_hz
        rate = found.batch_size / seconds
        lines[-1] += f" = {duration(seconds)} at {found.clock_hz / 1e9:.2f} GHz, {rate:.0f} images/s"
    lines.append("most expensive operations (estimated cycles):")
    lines += [f"  {scaled(cycles):>7}  {source}" for source, cycles in found.most_expensive]
    return "\n".join(lines)
