"""Temporary folders of this machine for runs in buckets. Those that a killed process has left are deleted."""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nfnet_flax.json_files import StorageFailed

_PREFIX = "nfnet_flax-run-"
_LOCK = ".lock"
"""File that a process locks as long as it uses the folder: the kernel frees it when the process ends in any way."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in the folder for temporary files (the variable TMPDIR, or /tmp), deleted at the end.

    Raises:
      StorageFailed: it cannot be made.
    """
    _delete_abandoned()
    with scratch_errors():
        path, descriptor = _made()

    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    try:
        yield path
    finally:
        atexit.unregister(remove)
        remove()
        os.close(descriptor)


@contextlib.contextmanager
def scratch_errors() -> Iterator[None]:
    """Converts errors of the disk while files are written to a scratch folder.

    Raises:
      StorageFailed: in place of an `OSError`; the message names the folder for temporary files, and the remedy. A
        `FileNotFoundError` is not converted: it says that something to be copied does not exist.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageFailed(f"{no_scratch_text()} ({error.strerror})") from error


def no_scratch_text() -> str:
    """What to do if the folder for temporary files takes no more files."""
    return (
        f"the folder for temporary files, {tempfile.gettempdir()}, cannot hold what is copied from or to the bucket: "
        "make room there, or set TMPDIR to another folder"
    )


def _made() -> tuple[Path, int]:
    """A new folder, and the descriptor of its locked file."""
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}")).resolve()
    descriptor = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = made.with_name(made.name.removeprefix("."))  # only now may other processes look whether it is abandoned
    made.rename(path)
    return path, descriptor


def _delete_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, in use, or just deleted by another process
            descriptor = os.open(path / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
