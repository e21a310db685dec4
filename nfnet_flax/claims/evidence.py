"""What was measured for a claim, with all that a reader needs to measure it again: command, machine, date, versions."""

import dataclasses
import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import json_content, read_json, write_named
from nfnet_flax.runtime import versions

FILE = "evidence.json"


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
    """Name of a package -> its version."""
    data: dict[str, Any]
    """What was measured; each claim describes its own."""


def evidence(claim: str, command: str, data: dict[str, Any]) -> Evidence:
    """Evidence that was measured just now, on this machine."""
    return Evidence(
        claim=claim,
        command=command,
        machine=_machine(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=versions(),
        data=data,
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
        found = Evidence(**content)
    except TypeError as error:
        raise ConfigError(f"{path} is not evidence ({error}): {remedy}") from error
    if found.claim != claim:
        raise ConfigError(f"{path} is evidence of the claim {found.claim!r}: {remedy}")
    return found


def origin(found: Evidence) -> str:
    """One line that says where the numbers are from, for texts and pictures."""
    names = ("nfnet_flax", "jax")
    packages = ", ".join(f"{name} {found.versions[name]}" for name in names if name in found.versions)
    return f"{found.command} ({found.machine}; {packages}; {found.date})"


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
