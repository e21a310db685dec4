"""What was measured for a claim, with all that a reader needs to measure it again: command, machine, date, versions."""

import dataclasses
import datetime
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import json_content, read_json, write_named
from nfnet_flax.runtime import versions

FILE = "evidence.json"
_NAMED = "nfnet_flax", "jax"
"""Packages whose versions texts name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """When and by what the runs of a study were made, which may be longer ago than its evidence."""

    number: int
    """Number of runs."""
    not_recorded: int
    """Number of those that kept neither versions nor date, as results of earlier versions of this package."""
    first_date: str
    """Day on which the first of the others ended; empty: there are none."""
    last_date: str
    versions: list[dict[str, str]]
    """All versions that occur: name of a package -> its version."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """The content of `evidence.json`."""

    claim: str
    """Name of the claim, as `nfnet claim` takes it."""
    command: str
    """Command line that measured it."""
    machine: str
    """Processor and its number of cores, and the system."""
    date: str
    """Day on which it ended, such as 2026-01-31."""
    versions: dict[str, str]
    """Name of a package -> its version; those of the command, see `runs`."""
    data: dict[str, Any]
    """What was measured; each claim describes its own."""
    runs: Runs | None = None
    """The runs that it was measured in; None: there are none, or they are not recorded."""


def evidence(claim: str, command: str, data: dict[str, Any], runs: Runs | None = None) -> Evidence:
    """Evidence that was measured just now, on this machine."""
    return Evidence(
        claim=claim,
        command=command,
        machine=_machine(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=versions(),
        data=data,
        runs=runs,
    )


def write_evidence(found: Evidence, folder: Path) -> Path:
    """Writes `evidence.json` into a folder, in place of an earlier one; returns its path.

    Raises:
      ConfigError: it cannot be written.
    """
    path = folder / FILE
    write_named("out", path, json_content(dataclasses.asdict(found)))
    return path


def read_evidence(path: Path, claim: str) -> Evidence:
    """Reads what `write_evidence` wrote.

    Raises:
      ConfigError: the file is missing, damaged, or of another claim.
      StorageFailed: it cannot be read.
    """
    remedy = f"give a file that nfnet claim {claim} wrote"
    content = read_json(path, remedy)
    try:
        runs = content.pop("runs", None)
        found = Evidence(**content, runs=None if runs is None else Runs(**runs))
    except TypeError as error:
        raise ConfigError(f"{path} is not evidence ({error}): {remedy}") from error
    if found.claim != claim:
        raise ConfigError(f"{path} is evidence of the claim {found.claim!r}: {remedy}")
    return found


def origin(found: Evidence) -> str:
    """One line that says where the numbers are from, for texts and pictures."""
    parts = [found.machine, version_text(found.versions), found.date]
    if (runs := found.runs) is not None:
        if len(runs.versions) > 1:
            parts.append(f"runs of several versions: {' and '.join(map(version_text, runs.versions))}")
        if {runs.first_date, runs.last_date} - {"", found.date}:
            dates = " to ".join(dict.fromkeys((runs.first_date, runs.last_date)))
            parts.append(f"runs of {dates}")
        if runs.not_recorded:
            parts.append(f"versions and date of {runs.not_recorded} of {runs.number} runs not recorded")
    return f"{found.command} ({'; '.join(parts)})"


def version_text(versions: Mapping[str, str]) -> str:
    """The versions of this package and of JAX, as far as they are known."""
    return ", ".join(f"{name} {versions[name]}" for name in _NAMED if name in versions)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; the first column is aligned to the left and the others to the right."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    if found := re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE):
        name = found.group(1).strip()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
