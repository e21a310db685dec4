"""Warnings: what a user has to know besides the results, such as that images are not used.

They go to the logger `nfnet_flax` and are printed to stderr, both by commands and in Python. A program can change this
with `logging`: `logging.getLogger("nfnet_flax").setLevel(logging.ERROR)` turns them off, and a handler of its own
receives them.
"""

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Iterator, Mapping

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
        error.args = tuple(_with_given_names(part) if isinstance(part, str) else part for part in error.args)
        raise
    finally:
        del _names[path]


def _with_given_names(text: str) -> str:
    for path, name in _names.items():
        text = text.replace(path, name)
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """Which options that are named after a field of a recipe, such as `--data.on-corrupt`, a command has.

    All code names them as `nfnet train` has them. This is the one place where a message becomes one of the command that
    prints it: it gets that command's word for the option, or says that only `nfnet train` has it.
    """

    command: str
    """The command, such as `nfnet probe`."""
    topics: tuple[str, ...] = ()
    """Beginnings of the options that it has under the same name, such as `data`."""
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Option of `nfnet train` -> the command's own option that does the same."""

    def fitted(self, text: str) -> str:
        """A message whose advice can be followed; the same text for one that was fitted before."""
        text = _FIELD_OPTION.sub(lambda found: self.words.get(found[0], found[0]), text)
        named = dict.fromkeys(found[0] for found in _FIELD_OPTION.finditer(text) if found[1] not in self.topics)
        if not named:
            return text
        verb = "is an option" if len(named) == 1 else "are options"
        note = f" ({', '.join(named)} {verb} of nfnet train; {self.command} has no such option)"
        return text if text.endswith(note) else text + note


_FIELD_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)(?:\.[a-z0-9-]+)+")
_advice: Advice | None = None
"""That of the command that runs; None: there is no command, or it has the options of all fields."""


@contextlib.contextmanager
def advising(advice: Advice | None) -> Iterator[None]:
    """Within the context, messages only advise options that the command has; None: it has those of all fields."""
    global _advice
    before, _advice = _advice, advice
    try:
        yield
    finally:
        _advice = before


def as_given(text: str) -> str:
    """A text with the names that the user gave (`renamed`) and the options of the command that runs (`advising`)."""
    text = _with_given_names(text)
    return text if _advice is None else _advice.fitted(text)


def warn(text: str | None) -> None:
    """Prints a warning; does nothing if the text is None."""
    if text is not None:
        _logger.warning("%s", as_given(text))
