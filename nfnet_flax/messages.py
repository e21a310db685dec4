"""Warnings: what a user has to know besides the results, such as that images are not used.

They go to the logger `nfnet_flax` and are printed to stderr, both by commands and in Python. A program can change this
with `logging`: `logging.getLogger("nfnet_flax").setLevel(logging.ERROR)` turns them off, and a handler of its own
receives them.
"""

import logging
import sys

_logger = logging.getLogger("nfnet_flax")


class _ToStderr(logging.Handler):
    """Prints to `sys.stderr`, which is looked up at each message, as it may have been replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"nfnet: {record.getMessage()}", file=sys.stderr, flush=True)


if not _logger.handlers:
    _logger.addHandler(_ToStderr())
    _logger.propagate = False  # absl, which Orbax imports, would print it a second time


def warn(text: str | None) -> None:
    """Prints a warning; does nothing if the text is None."""
    if text is not None:
        _logger.warning("%s", text)
