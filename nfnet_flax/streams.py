"""The standard streams of the command's process, before its first and after its last word."""

import contextlib
import os
import sys


def open_missing() -> None:
    """Opens what the command was started without (`>&-`).

    Otherwise the next file that is opened gets the number of stdout or stderr, and C++ code writes its messages there.
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
    """Drops what cannot be written: Python writes it when it ends, and would change the exit code for its failure."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # not a file of the system's
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)
