"""docs/constraints/: versions of packages with which the tests were run fit what pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.runs import ROOT

FILES = {"oldest": "3.11", "newest": "3.11", "newest-py313": "3.13"}
"""Name of a file -> the Python that it is for."""


def pins(name: str) -> dict[str, Version]:
    """Package -> its version; every line that is no comment is a plain pin."""
    text = (ROOT / "docs" / "constraints" / f"{name}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line) for line in lines]
    assert all(found), f"{name}.txt: {next(line for line, pin in zip(lines, found, strict=True) if not pin)!r}"
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in found if pin}


def direct(python: str) -> list[Requirement]:
    """What the package and its extra `test` require, on Linux x86_64."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    machine = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": python}
    declared = map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"])
    return [needed for needed in declared if needed.marker is None or needed.marker.evaluate(machine)]


def test_every_file_is_tested() -> None:
    assert {path.stem for path in (ROOT / "docs" / "constraints").iterdir()} == set(FILES)


@pytest.mark.parametrize(("name", "python"), FILES.items())
def test_constraints_fit_the_bounds(name: str, python: str) -> None:
    pinned = pins(name)
    for needed in direct(python):
        version = pinned.get(canonicalize_name(needed.name))
        assert version is not None, f"{name}.txt lacks {needed.name}"
        assert version in needed.specifier, f"{name}.txt: {needed.name}=={version} does not fit {needed}"
    header = (ROOT / "docs" / "constraints" / f"{name}.txt").read_text().splitlines()[:2]
    assert f"Python {python}." in header[0]
    assert header[1].endswith(f"bash tools/test_versions.sh --write {name}=python{python}")


def test_the_oldest_are_the_lower_bounds() -> None:
    pinned = pins("oldest")
    for needed in direct(FILES["oldest"]):
        (bound,) = [part.version for part in needed.specifier if part.operator == ">="]
        version = pinned[canonicalize_name(needed.name)]
        assert version == Version(bound), f"{needed.name}: {version} was tested, and {needed} is allowed"


def test_files_name_no_place() -> None:
    for path in (ROOT / "docs" / "constraints").iterdir():
        assert not re.search(r"://|/\w+/| @ ", Path(path).read_text()), f"{path} names a folder or a host"
