"""GPUs for whose programs no GPU is needed: what XLA's compiler must know of each kind, and their published rates."""

import dataclasses
import importlib.metadata
import re
from typing import Any

from nfnet_flax.config import ConfigError

_GPUS_PER_HOST = 8
_BFLOAT16, _FLOAT16, _FLOAT32, _FLOAT64 = 16, 10, 11, 12
"""XLA's numbers of types."""
_CUDNN_VERSION = (9, 12, 0)
"""The oldest cuDNN that JAX's extra `cuda13` installs."""
_CUDA_VERSION = (13, 0, 0)
_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-runtime")
_REMEDY = "pip install 'nfnet_flax[cuda-plan]' (Linux on x86-64)"
_EXAMPLES = "h100:8 or a100:8: the number of GPUs is 1 to 8, or whole hosts of 8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuKind:
    """A kind of GPU. Rates and sizes are those of NVIDIA's data sheets and of its compute capability; those that only
    steer how operations are fused are as in XLA's own descriptions of these GPUs."""

    name: str
    compute_capability: str
    """As XLA's description writes it."""
    flops_per_s: float
    """Published peak of dense matrix products in bfloat16."""
    bytes_per_s: float
    """Published bandwidth of the device's memory."""
    memory_bytes: int
    """Size of the device's memory."""
    num_processors: int
    """Number of streaming multiprocessors."""
    float32_units: int
    """Number of float32 units of a multiprocessor."""
    shared_bytes: int
    """Shared memory of a multiprocessor."""
    shared_bytes_of_block: int
    """The largest part of it that a block of threads can get."""
    cache_bytes: int
    """Size of the L2 cache."""
    clock_ghz: float
    matrix_clock_ghz: float | None
    """Clock of the matrix units under load; None: XLA's description has no rates of units."""


GPUS = {
    "h100": GpuKind(
        name="NVIDIA H100 80GB HBM3",
        compute_capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        flops_per_s=989.4e12,
        bytes_per_s=3.35e12,
        memory_bytes=84_942_979_072,
        num_processors=132,
        float32_units=128,
        shared_bytes=233_472,
        shared_bytes_of_block=232_448,
        cache_bytes=50 << 20,
        clock_ghz=1.98,
        matrix_clock_ghz=1.83,
    ),
    "a100": GpuKind(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability="major: 8 feature_extension: NONE",
        flops_per_s=312e12,
        bytes_per_s=2.039e12,
        memory_bytes=85_100_068_864,
        num_processors=108,
        float32_units=64,
        shared_bytes=167_936,
        shared_bytes_of_block=166_912,
        cache_bytes=40 << 20,
        clock_ghz=1.41,
        matrix_clock_ghz=None,
    ),
}
"""Name in a topology -> kind of GPU (both in the SXM form)."""


def names_gpus(topology: str) -> bool:
    """Whether the name of a topology is, or was meant as, one of GPUs; TPUs are called `v5e:2x4` or `tpu7x:2x2x1`."""
    return re.match(r"(?!v\d|tpu)[a-z]+\d+", topology.lower()) is not None


def kind_of(topology: str) -> GpuKind:
    """The kind of the GPUs of a topology; raises `ConfigError` if it is not known."""
    kind = GPUS.get(topology.partition(":")[0])
    if kind is None:
        raise ConfigError(
            f"topology {topology!r}: the GPUs that can be planned for are {' and '.join(GPUS)}, as in {_EXAMPLES}"
        )
    return kind


def gpus_of(topology: str) -> list[Any]:
    """The GPUs of a topology such as `h100:8`, as JAX describes devices that programs are compiled for.

    Raises:
      ConfigError: the kind or the number is not possible, or a package of the extra `cuda-plan` is missing.
    """
    kind = kind_of(topology)
    number = topology.partition(":")[2]
    count = int(number) if number.isdecimal() and number.isascii() else 0
    if count < 1 or (count > _GPUS_PER_HOST and count % _GPUS_PER_HOST):
        raise ConfigError(f"topology {topology!r}: give a number of GPUs, as in {_EXAMPLES}")
    _require_packages(topology)
    from jax.experimental import topologies

    hosts, per_host = max(1, count // _GPUS_PER_HOST), min(count, _GPUS_PER_HOST)
    try:
        # The first number is that of groups of hosts between which only a network is.
        shape = f"1x{hosts}x{per_host}"
        found = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=_description(kind))
    except Exception as error:  # the plugin's own errors have no common class
        raise ConfigError(f"topology {topology!r}: {str(error).splitlines()[0]}. This needs {_REMEDY}") from error
    return list(found.devices)


def _require_packages(topology: str) -> None:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(f"topology {topology!r}: {package} is not installed. This needs {_REMEDY}") from error
    plugin, of_jax = versions["jax-cuda13-plugin"], importlib.metadata.version("jaxlib")
    if plugin != of_jax:
        raise ConfigError(
            f"topology {topology!r}: jax-cuda13-plugin {plugin} does not belong to jaxlib {of_jax}: "
            f"pip install jax-cuda13-plugin=={of_jax} jax-cuda13-pjrt=={of_jax}"
        )


def _description(kind: GpuKind) -> str:
    """What the compiler must know of a GPU, as text of XLA's message `GpuTargetConfigProto`."""
    major, minor, patch = _CUDNN_VERSION
    cuda = dict(zip(("major", "minor", "patch"), _CUDA_VERSION, strict=True))
    facts = {
        # The same for both compute capabilities.
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": kind.shared_bytes,
        "shared_memory_per_block_optin": kind.shared_bytes_of_block,
        "core_count": kind.num_processors,
        "fpus_per_core": kind.float32_units,
        "memory_bandwidth": int(kind.bytes_per_s),
        "l2_cache_size": kind.cache_bytes,
        "clock_rate_ghz": kind.clock_ghz,
        "device_memory_size": kind.memory_bytes,
    }
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += [f"cuda_compute_capability {{ {kind.compute_capability} }}", *_unit_rates(kind)]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}",
            "runtime_version { " + " ".join(f"{name}: {value}" for name, value in cuda.items()) + " }",
            f'device_description_str: "{kind.name}"',
        ]
    )


def _unit_rates(kind: GpuKind) -> list[str]:
    """How much the units of a multiprocessor compute per clock, where XLA's own description has it."""
    if kind.matrix_clock_ghz is None:
        return []
    scalar = {_FLOAT16: (128, 2), _FLOAT32: (128, 1), _FLOAT64: (64, 1), _BFLOAT16: (128, 2)}
    matrix = {_FLOAT16: (4, 512), _FLOAT32: (4, 256), _FLOAT64: (4, 32), _BFLOAT16: (4, 512)}
    found = []
    for name, units, clock in (
        ("scalar_unit_description", scalar, kind.clock_ghz),
        ("matrix_unit_description", matrix, kind.matrix_clock_ghz),
    ):
        rates = []
        for key, (count, operations) in units.items():
            rate = f"clock_rate_ghz: {clock} units_per_core: {count} ops_per_clock: {operations}"
            rates.append(f"rate_infos {{ key: {key} value {{ {rate} }} }}")
        found.append(f"{name} {{ {' '.join(rates)} }}")
    return found
