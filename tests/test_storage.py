"""What a disk that fails leaves to be read."""

import subprocess
import sys

import pytest

from tests import runs

ABANDONED = """
import asyncio
import sys
import tensorstore
from nfnet_flax.training.storage import silence_abandoned_writes

if sys.argv[1] == "hushed":
    silence_abandoned_writes()
promise, write = tensorstore.Promise.new()

async def wait():
    await write

loop = asyncio.new_event_loop()
task = loop.create_task(wait())
loop.run_until_complete(asyncio.sleep(0))
loop.close()
promise.set_result(0)

class Other:
    def __del__(self):
        raise RuntimeError("something else")

Other()
"""


@pytest.mark.parametrize("hushed", [True, False])
def test_the_end_of_a_write_that_a_failed_save_gave_up_is_not_printed(hushed: bool) -> None:
    words = [sys.executable, "-c", ABANDONED, "hushed" if hushed else ""]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120, cwd=runs.ROOT)
    assert ("Event loop is closed" in done.stderr) == (not hushed)
    assert "RuntimeError: something else" in done.stderr
