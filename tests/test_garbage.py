"""How often Python looks for garbage: rarely in the command's own process, as ever in a process of somebody else."""

import subprocess
import sys

import pytest

SHOWN = "import atexit, gc; atexit.register(lambda: print(gc.get_threshold())); "
IN_THE_COMMAND = "import sys; sys.argv[1:] = ['recipes']; from nfnet_flax.cli import program; program()"
IN_A_NOTEBOOK = "from nfnet_flax.cli import main; main(['recipes'])"


@pytest.mark.parametrize(("code", "is_rare"), [(IN_THE_COMMAND, True), (IN_A_NOTEBOOK, False)])
def test_only_a_process_of_our_own_looks_rarely(code: str, is_rare: bool) -> None:
    def threshold_after(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", SHOWN + code], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert (threshold_after(code) != threshold_after("pass")) == is_rare
