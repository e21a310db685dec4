"""Reads files with a JSON object in each line, to which a process appends that may be killed at any moment."""

import json
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed


def read_lines(path: Path, begins: bytes) -> tuple[list[tuple[int, dict[str, Any]]], list[int]]:
    """Reads a file with a JSON object in each line.

    Args:
      path: the file; if it does not exist, there are no lines.
      begins: how the objects begin. After a kill in the middle of a line, the next object may follow in the same one.

    Returns:
      The objects with the numbers of their lines, from 1; and the numbers of lines that hold something else, too, such
      as an object that was cut short. The last line of a file that is being written is not among these.

    Raises:
      ConfigError: a folder has the name of the file.
      StorageFailed: the file cannot be opened or read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder, but a run writes a file there: move it away") from error
    except OSError as error:
        raise StorageFailed(f"{path}: {type(error).__name__}: {error.strerror}") from error
    found, unread = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        data = _object_of(line)
        if data is None:
            unread.append(number)
            start = line.rfind(begins)
            data = _object_of(line[start:]) if start > 0 else None
        if data is not None:
            found.append((number, data))
    if unread and not content.endswith(b"\n") and unread[-1] == content.count(b"\n") + 1:
        unread.pop()
    return found, unread


def wrong_format(path: Path, number: int, text: str) -> ConfigError:
    """The error for a complete line whose object is not what this version writes."""
    return ConfigError(
        f"{path}, line {number}: {text}: it was written by another version of nfnet_flax, or changed by hand; read it "
        "with that version, or move the file away"
    )


def _object_of(text: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
