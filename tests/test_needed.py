"""Packages that are not installed: the command says which, and how to install them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nfnet_flax.exit_codes import EXIT_BAD_INPUT
from nfnet_flax.needed import NAMES, what_to_install
from tests.runs import ROOT

WITHOUT = """
import sys

missing = sys.argv.pop(1)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from nfnet_flax.cli import program
program()
"""


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("absl", "--version"),
        ("tyro", "models"),
        ("cv2", "train digits --debug --workdir run"),
        ("grain", "train digits --debug --workdir run"),
    ],
)
def test_the_command_names_a_missing_package_and_the_remedy(module: str, command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, module, *command.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    *_, last = done.stderr.splitlines()
    assert re.match(rf"nfnet: error: the package {NAMES[module]} is not installed, .*; pip install nfnet_flax ", last)
    assert "Traceback" not in done.stderr


def test_every_needed_package_is_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}  # type: ignore[index]
    assert set(NAMES.values()) == declared - {"tensorflow-cpu"}  # the same module as tensorflow


def test_other_errors_are_none_of_a_missing_package() -> None:
    assert what_to_install(ImportError("cannot import name 'x' from 'jax'", name="jax")) is None
    assert what_to_install(ModuleNotFoundError("No module named 'theirs'", name="theirs")) is None
    assert what_to_install(ModuleNotFoundError("No module named 'nfnet_flax.x'", name="nfnet_flax.x")) is None
