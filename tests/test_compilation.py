"""Settings of the process that computes: here, what memory it keeps."""

import subprocess
import sys

_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from nfnet_flax.training.compilation import keep_freed_memory, return_freed_memory

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
