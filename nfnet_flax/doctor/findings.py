"""One line of the doctor's report, and functions that several checks use."""

import contextlib
import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    text: str
    """What was found; for a problem also what to do about it."""
    is_wrong: bool = False
    """Whether it is a problem."""


def seen(text: str) -> Finding:
    """A finding that is no problem."""
    return Finding(text=text)


def wrong(problem: str, remedy: str) -> Finding:
    """A finding that is a problem, and what to do about it."""
    return Finding(text=f"{problem}: {remedy}", is_wrong=True)


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def tree_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run may delete it meanwhile
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes
