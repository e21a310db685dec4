"""Settings of the process that computes: here, what memory it keeps."""

import subprocess
import sys

_FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from nfnet_flax.training.compilation import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
sorted_twice = jax.jit(lambda x: jnp.sort(jnp.sort(x * 2).T).sum())  # sorted arrays are temporary
x = jnp.ones((2048, 2048))
jax.block_until_ready(sorted_twice(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    jax.block_until_ready(sorted_twice(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(argument: str) -> int:
    """Of three calls of a compiled program, in a process of its own."""
    command = [sys.executable, "-c", _FAULTS, argument]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_step_finds_the_memory_that_the_last_one_freed() -> None:
    faults = page_faults("leave")
    assert faults > 3 * 2048 * 2048 * 4 / 65536, "the program's temporary memory is not returned any more"
    assert page_faults("keep") < faults / 10
