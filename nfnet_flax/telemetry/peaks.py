"""Peak arithmetic speed of devices: what a run's speed is compared with."""

import dataclasses
import functools
import time
from collections.abc import Mapping

import numpy as np

_SIZE = 1024
"""Rows and columns of the matrices by which a CPU is measured."""
_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak arithmetic speed of one device, as JAX counts devices."""

    flops_per_s: float
    """Floating-point operations per second; a multiplication and an addition are two."""
    source: str
    """Where the number is from."""


_TPU = "published by Google Cloud (bfloat16, also used for float32 at JAX's default precision)"
_NVIDIA = "published by NVIDIA (tensor cores, without sparsity)"
# TFLOP/s of a device for bfloat16 and float32. A core of a TPU v2, v3 or v7 is a device of its own.
_PUBLISHED: Mapping[str, tuple[float, float, str]] = {
    "TPU v2": (22.5, 22.5, _TPU),
    "TPU v3": (61.5, 61.5, _TPU),
    "TPU v4": (275.0, 275.0, _TPU),
    "TPU v5 lite": (197.0, 197.0, _TPU),
    "TPU v5": (459.0, 459.0, _TPU),
    "TPU v6 lite": (918.0, 918.0, _TPU),
    "TPU7x": (1153.5, 1153.5, _TPU),
    "NVIDIA A100": (312.0, 156.0, _NVIDIA),
    "NVIDIA L4": (121.0, 60.0, _NVIDIA),
    "NVIDIA L40S": (362.0, 183.0, _NVIDIA),
    "NVIDIA H100 PCIe": (756.0, 378.0, _NVIDIA),
    "NVIDIA H100 NVL": (835.0, 417.5, _NVIDIA),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, _NVIDIA),
    "NVIDIA H200": (989.4, 494.7, _NVIDIA),
    "NVIDIA B200": (2250.0, 1125.0, _NVIDIA),
}


def peak_of(device_kind: str, dtype: str) -> Peak | None:
    """The peak of a kind of device (`jax.Device.device_kind`), for `bfloat16` or `float32`; None: it is not known.

    The peak of a CPU is measured, which takes a tenth of a second: it is that of the whole host.
    """
    if device_kind == "cpu":
        return _peak_of_cpu()
    name = max((name for name in _PUBLISHED if device_kind.startswith(name)), key=len, default=None)
    if name is None or (name in ("TPU v5", "NVIDIA L4") and device_kind != name):
        return None
    bfloat16, float32, source = _PUBLISHED[name]
    return Peak(1e12 * (bfloat16 if dtype == "bfloat16" else float32), source)


@functools.cache
def _peak_of_cpu() -> Peak:
    """The fastest of a few products of float32 matrices, by NumPy, on all cores of this host."""
    matrix = np.random.default_rng(0).standard_normal((_SIZE, _SIZE), np.float32)
    result = np.empty_like(matrix)
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        np.matmul(matrix, matrix, out=result)
        seconds.append(time.perf_counter() - started)
    source = f"measured at the start: a product of float32 matrices of {_SIZE} x {_SIZE} on this host"
    return Peak(2 * _SIZE**3 / min(seconds), source)
