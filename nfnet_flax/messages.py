"""What a user has to know besides the results, such as images that are not used: warnings of the logger `nfnet_flax`.

They are printed to stderr, in commands and in Python alike. A program that embeds a run decides otherwise by the means
of `logging`: `logging.getLogger("nfnet_flax").setLevel(logging.ERROR)` silences them, a handler takes them elsewhere.
"""

import logging
import sys

_logger = logging.getLogger("nfnet_flax")


class _ToStderr(logging.Handler):
    """Prints to what `sys.stderr` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"nfnet: {record.getMessage()}", file=sys.stderr, flush=True)


if not _logger.handlers:
    _logger.addHandler(_ToStderr())
    _logger.propagate = False  # absl, which Orbax imports, would print it a second time


def warn(text: str | None) -> None:
    """Says something; nothing for None."""
    if text is not None:
        _logger.warning("%s", text)
