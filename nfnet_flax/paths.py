"""Paths as users give them, resolved once, where they enter: commands, the Python API and recipes all come here."""

import contextlib
import os
import re
from pathlib import Path

from nfnet_flax.config import ConfigError, require

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""`gs://bucket/run`, and what `Path` makes of it, `gs:/bucket/run`."""


def check_path(field: str, value: str | os.PathLike[str]) -> None:
    """Refuses what cannot be the path of a local file or folder; looks at no disk.

    Raises:
      ConfigError: it is no text, empty, a URL, or holds a NUL character; the message names the field, the value and the
        remedy.
    """
    require(isinstance(value, str | os.PathLike), field, value, "give a path, as text or as pathlib.Path")
    text = os.fspath(value)
    if not text:
        raise ConfigError(f"{field} = '': is empty (a variable that is not set?): give a path; . is the current folder")
    if "\0" in text:
        raise ConfigError(f"{field} = {text!r}: holds a NUL character, which no path can")
    if _URL.match(text):
        raise ConfigError(
            f"{field} = {text!r}: is a URL, and only paths of this machine's file systems are supported: mount the "
            f"bucket, or copy it here (a folder that is really named so: ./{text})"
        )


def local_path(field: str, value: str | os.PathLike[str]) -> Path:
    """The absolute path that a user means, without `~`, `..` and symbolic links; it need not exist.

    Args:
      field: names the value in a message, such as `workdir`.
      value: as given.

    Raises:
      ConfigError: as `check_path`; or the home folder is unknown, or symbolic links form a loop.
    """
    check_path(field, value)
    try:
        path = Path(value).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # what is there is not asked
            path.stat()  # from Python 3.13 on `resolve` passes over a loop of symbolic links
        return path
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder; before Python 3.13 also for a loop
        raise ConfigError(f"{field} = {os.fspath(value)!r}: {error}: give another path") from error


def run_folder(field: str, value: str | os.PathLike[str]) -> Path:
    """`local_path` of the folder of a run, whose arrays TensorStore writes and reads.

    Raises:
      ConfigError: as `local_path`; or TensorStore would look elsewhere: it takes a backslash for a slash, on every
        system, and knows no name that is not UTF-8.
    """
    path = local_path(field, value)
    given = os.fspath(value)
    where = "" if str(path) == given else f" (which is {str(path)!r})"
    if "\\" in str(path):
        raise ConfigError(
            f"{field} = {given!r}{where}: holds a backslash, which the library that stores arrays takes for a slash: "
            "rename the folder, or give another one"
        )
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{field} = {given!r}{where}: is not UTF-8, so the library that stores arrays cannot name it: rename the "
            "folder, or give another one"
        ) from error
    return path
