"""The standard streams of a command's process, at its start and at its end."""

import contextlib
import os
import sys


def open_missing() -> None:
    """Opens the standard streams that are closed, as after `>&-` in a shell.

    Otherwise the next file that is opened gets the file descriptor of stdout or stderr, and C++ code writes its
    messages into that file.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def drop_unwritten() -> None:
    """Drops buffered text that cannot be written: Python would write it at its end, fail, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # the stream has no file descriptor
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)
