"""JSON files of a run: written as a whole or not at all, and read with an error that names the file."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError


class StorageFailed(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """The folder of a run cannot be written or read. The message names it and the reason; older checkpoints are
    kept."""


def write_whole(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Replaces a file, so that a process killed at any moment, or a full disk, leaves either the old or the new one.

    Args:
      path: the file.
      content: its bytes.
      mode: its permissions; None: those of new files.

    Raises:
      OSError: it cannot be written; the old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def write_named(field: str, path: Path, content: bytes) -> None:
    """Writes a file that the user named, as a whole or not at all.

    Args:
      field: name of the value in the message, such as `out`.
      path: the file; `paths.check_target` has checked it.
      content: its bytes.

    Raises:
      ConfigError: it cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{field} = {str(path)!r}: cannot be written: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    """Makes a new file name in a folder survive a power failure, where the file system supports this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file by `write_whole`.

    Raises:
      ValueError: the data hold a number that JSON does not have (NaN, infinity).
      OSError: it cannot be written; the old file is unchanged.
    """
    write_whole(path, json_content(data))


def json_content(data: Any) -> bytes:
    """The content of a JSON file.

    Raises:
      ValueError: the data hold a number that JSON does not have (NaN, infinity).
    """
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads the JSON object that `write_json` wrote.

    Args:
      path: path of the file.
      remedy: what the user can do; the end of the message of a `ConfigError`.

    Raises:
      ConfigError: the file is missing, empty, cut short, not UTF-8, or contains something else than a JSON object.
      StorageFailed: it cannot be opened or read; what it contains is then unknown.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path} does not exist: {remedy}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder instead of a file: {remedy}") from error
    except OSError as error:
        raise StorageFailed(f"{path}: {type(error).__name__}: {error.strerror}") from error
    return parse_json(content, path, remedy)


def parse_json(content: bytes, path: object, remedy: str) -> dict[str, Any]:
    """The JSON object in the content of a file.

    Args:
      content: the bytes of the file.
      path: the file, for messages.
      remedy: as for `read_json`.

    Raises:
      ConfigError: it is empty, cut short, not UTF-8, or contains something else than a JSON object.
    """
    try:
        data = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # raised by decoding and by JSON
        reason = f"{error}" if content else "it is empty"
        raise ConfigError(f"{path} is damaged ({reason}): {remedy}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return data
