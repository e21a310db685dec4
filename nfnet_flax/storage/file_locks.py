"""Locks between the processes of a host. The system releases them when a process ends, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds the lock that a file stands for; the file is made if needed.

    Yields whether the lock is held: always with `wait`; without, only if nobody else holds it.

    Raises:
      OSError: the file cannot be made or locked.
    """
    descriptor = _lock(path, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def hold(path: Path) -> int | None:
    """Takes a lock without waiting; returns the descriptor that holds it until it is closed, None if another does."""
    return _lock(path, wait=False)


def _lock(path: Path, *, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has deleted the file: it stands for nothing any more
