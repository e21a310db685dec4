"""Warnings: what a user has to know besides the results, such as that images are not used.

They go to the logger `nfnet_flax` and are printed to stderr, both by commands and in Python. A program can change this
with `logging`: `logging.getLogger("nfnet_flax").setLevel(logging.ERROR)` turns them off, and a handler of its own
receives them.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

from nfnet_flax.verbosity import stamp

_logger = logging.getLogger("nfnet_flax")


class _ToStderr(logging.Handler):
    """Prints to `sys.stderr`, which is looked up at each message, as it may have been replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        _print_line(f"{stamp()}nfnet: {record.getMessage()}")


class NotesToStderr(logging.Handler):
    """Prints the notes of a library, each with the name of its module."""

    def emit(self, record: logging.LogRecord) -> None:
        _print_line(f"{stamp()}{record.module}: {record.getMessage()}")


def _print_line(text: str) -> None:
    # Not by `print`, which writes the end of the line by itself: a line of another thread could come between.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if not _logger.handlers:
    _logger.addHandler(_ToStderr())
    _logger.propagate = False  # absl, which Orbax imports, would print it a second time


_names: dict[str, str] = {}
"""Beginning of a path that the user does not know -> the name that the user gave."""


@contextlib.contextmanager
def renamed(path: str, name: str) -> Iterator[None]:
    """Within the context, warnings and errors show `name`, which the user gave, in place of a temporary `path`."""
    _names[path] = name
    try:
        yield
    except Exception as error:
        error.args = tuple(as_given(part) if isinstance(part, str) else part for part in error.args)
        raise
    finally:
        del _names[path]


def as_given(text: str) -> str:
    """A text with the names that the user gave; see `renamed`."""
    for path, name in _names.items():
        text = text.replace(path, name)
    return text


def warn(text: str | None) -> None:
    """Prints a warning; does nothing if the text is None."""
    if text is not None:
        _logger.warning("%s", as_given(text))
