"""Temporary folders of this machine for runs in buckets. Those that a killed process has left are deleted."""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "nfnet_flax-run-"
_LOCK = ".lock"
"""File that a process locks as long as it uses the folder: the kernel frees it when the process ends in any way."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in the folder for temporary files (the variable TMPDIR, or /tmp), deleted at the end.

    Raises:
      OSError: it cannot be made.
    """
    _delete_abandoned()
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}")).resolve()
    descriptor = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = made.with_name(made.name.removeprefix("."))  # only now may other processes look whether it is abandoned
    made.rename(path)

    def remove() -> None:
        shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    try:
        yield path
    finally:
        atexit.unregister(remove)
        remove()
        os.close(descriptor)


def _delete_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, in use, or just deleted by another process
            descriptor = os.open(path / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
