"""How much a command prints: `-q` and `-v`. Functions that Python code calls print as without these options."""

import contextlib
import datetime
from collections.abc import Iterator
from typing import Literal

Level = Literal["quiet", "normal", "verbose"]
"""`quiet`: warnings, errors and results. `verbose`: lines with the time in place of drawn progress, the notes of the
libraries, and the traceback of every error."""

_level: Level = "normal"


@contextlib.contextmanager
def printing(level: Level) -> Iterator[None]:
    """Within the context, this process prints so much."""
    global _level
    before, _level = _level, level
    try:
        yield
    finally:
        _level = before


def is_quiet() -> bool:
    """Whether only warnings, errors and results are printed."""
    return _level == "quiet"


def is_verbose() -> bool:
    """Whether everything is printed."""
    return _level == "verbose"


def stamp() -> str:
    """What stands before a line that is printed: with `-v` the time, otherwise nothing."""
    return f"{time_text()} " if is_verbose() else ""


def time_text() -> str:
    """The time of this machine to the second, with its distance from UTC, as in ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
