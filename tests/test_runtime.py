"""Settings of the process that computes: its memory, its thread pool, and what is recorded of its surroundings."""

import glob
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nfnet_flax.runtime import NVIDIA_FILES, environment, xla_flags
from tests import runs

_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from nfnet_flax.runtime import keep_freed_memory, return_freed_memory

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "keep":
    assert keep_freed_memory()
transformed = jax.jit(lambda x: jnp.abs(jnp.fft.fft(jnp.fft.fft(x).T)).sum())  # the transforms are temporary
x = jnp.ones((1536, 1536))
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(transformed(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
before = resident_bytes()
return_freed_memory()
print(sum(faults[20:]), before - resident_bytes())
"""
_TRANSFORM_BYTES = 1536 * 1536 * 8


def page_faults_and_returned_bytes(argument: str) -> tuple[int, int]:
    """Of the last 20 of 40 calls of a compiled program in a process of its own, and after them."""
    command = [sys.executable, "-c", _PROGRAM, argument]
    faults, returned_bytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(faults), int(returned_bytes)


def test_a_step_finds_the_memory_that_the_last_one_freed_until_it_is_given_back() -> None:
    faults, _ = page_faults_and_returned_bytes("leave")
    assert faults > 20 * _TRANSFORM_BYTES / 65536, "the program's temporary memory is not returned any more"
    kept_faults, returned_bytes = page_faults_and_returned_bytes("keep")
    assert kept_faults < faults / 2  # not 0: now and then a small block lies in a gap, and the heap grows once more
    assert returned_bytes > _TRANSFORM_BYTES


def differing(before: dict[str, str]) -> dict[str, str]:
    """What `environment` tells now that it did not tell before."""
    return {name: value for name, value in environment().items() if before.get(name) != value}


def test_the_environment_holds_what_changes_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment()
    assert before["jax"] == jax.__version__
    assert before["thread_pool_size"] == os.environ["NPROC"]
    assert before["cpu_features"]
    assert all(isinstance(value, str) for value in before.values())
    with jax.enable_x64(True):
        assert differing(before) == {"jax_enable_x64": "True"}
    with jax.default_prng_impl("rbg"):
        assert differing(before) == {"jax_default_prng_impl": "rbg"}
    with jax.threefry_partitionable(False):
        assert differing(before) == {"jax_threefry_partitionable": "False"}
    with jax.default_matmul_precision("tensorfloat32"):
        assert differing(before) == {"jax_default_matmul_precision": "tensorfloat32"}
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_max_isa=AVX2")
    assert list(differing(before)) == ["XLA_FLAGS"]
    # The number of devices is free, and so is what is written for people to read.
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_force_host_platform_device_count=4 --xla_dump_to=/tmp/x")
    assert differing(before) == {}


def test_flags_of_xla_may_stand_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flags").write_text("--xla_cpu_max_isa=AVX\n--xla_gpu_deterministic_ops\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert xla_flags() == {"xla_cpu_max_isa": "AVX", "xla_gpu_deterministic_ops": "true"}


_TOO_LATE = """
import os, sys
import jax
from nfnet_flax.runtime import environment, prepare
if sys.argv[1] == "late":
    jax.devices()
    os.environ["NPROC"] = "5"
prepare(reproducible=True)
prepare()
print(environment()["thread_pool_size"])
"""


@pytest.mark.parametrize(("when", "size"), [("early", "3"), ("late", "3")])
def test_a_thread_pool_that_was_started_before_is_told_once(when: str, size: str) -> None:
    command = [sys.executable, "-c", _TOO_LATE, when]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "3"}
    )
    assert done.stdout.split() == [size]
    assert done.stderr.count("JAX was in use before") == (when == "late")
    assert ("its thread pool has 3 threads, not 5" in done.stderr) == (when == "late")


def test_a_tpu_library_without_a_tpu_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "libtpu.py").write_text("def get_library_path():\n    print('asked')\n    return '/nowhere'\n")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = f"{tmp_path}:{runs.ROOT}"
    for prepared, printed in (("pass", "asked\ncpu\n"), ("prepare()", "cpu\n")):
        program = f"from nfnet_flax.runtime import jax, prepare; {prepared}; print('now'); print(jax.default_backend())"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.stdout.partition("now\n")[2] == printed, done.stderr


@pytest.mark.skipif(
    any(glob.glob(pattern) for pattern in NVIDIA_FILES), reason="this machine may have a GPU, which is then used"
)
def test_a_compiler_for_gpus_without_a_gpu_is_left_alone(tmp_path: Path) -> None:
    plugin = tmp_path / "jax_plugins" / "xla_cuda13"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(
        "def initialize():\n    from jax import config\n    print(config.jax_platforms)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment["PYTHONPATH"] = f"{tmp_path}:{runs.ROOT}"
    for prepared, printed in (("pass", "None\n"), ("prepare(reproducible=True)", "cpu\n")):
        program = (
            f"from nfnet_flax.runtime import jax, prepare, xla_flags; {prepared}; jax.devices(); print(xla_flags())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.stdout == printed + "{}\n", done.stderr
