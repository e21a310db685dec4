"""What a command or a run prints: a failure to print must not end the run, and text must not mix with what is drawn.

Progress is drawn on the last lines of a terminal, in a `Region`. Whatever is printed meanwhile is printed above it.
"""

import contextlib
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, cast

_UNABLE_TERMINALS = ("", "dumb", "unknown")
"""Values of the variable TERM for terminals whose lines cannot be erased."""
_USUAL_COLUMNS = 80
_drawing = threading.RLock()
"""Held while text is printed on a terminal on which something is drawn, and while it is drawn."""
_region: "Region | None" = None
_is_line_open = False
"""Whether the last text that was printed on a terminal did not end its line: then nothing is drawn."""
_recorder: Callable[[str], None] | None = None
_only_results_follow = False
"""Whether the work of a command that goes on without its output is done."""


class OutputLost(Exception):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """Printed text could not be written; the cause of this exception says why."""


class _Guarded:
    """A text stream whose failures are reported once on stderr, or raised as `OutputLost`."""

    def __init__(self, stream: TextIO, name: str, *, goes_on: bool) -> None:
        self._stream = stream
        self._name = name
        self._goes_on = goes_on
        self._has_failed = False
        self._below = stream if isinstance(stream, _Guarded) else None
        self._is_terminal = self._below is None and _is_terminal(stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text; characters that the stream's encoding does not have are written as escapes."""
        global _is_line_open
        if self._below is not None:
            self._attempt(lambda: self._stream.write(text))
            return len(text)
        # A text that is not printed on a terminal waits for nobody, as its reader may be slow.
        with _drawing if self._is_terminal else contextlib.nullcontext():
            if self._is_terminal and text:
                if _region is not None:
                    _region.erase()
                _is_line_open = not text.endswith("\n")
            self._attempt(lambda: self._write(text))
        if _recorder is not None:
            _recorder(text)
        return len(text)

    def draw(self, text: str) -> None:
        """Writes text that is not a message, such as control characters of the terminal."""
        if self._below is not None:
            self._below.draw(text)
        else:
            self._attempt(lambda: self._write(text))

    def flush(self) -> None:
        """Writes what the stream has buffered."""
        self._attempt(self._stream.flush)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            if not self._goes_on:
                raise OutputLost(self._name) from error
            if self._has_failed:
                return
            self._has_failed = True
            if not _only_results_follow:
                print(f"nfnet: {self._name} cannot be written ({error}); the run goes on without it", file=sys.stderr)
            elif not isinstance(error, BrokenPipeError):  # as of `| head`: its reader has what it wants
                print(f"nfnet: {self._name} cannot be written ({error})", file=sys.stderr)


class Region:
    """The last lines of the terminal, on which something is drawn. There is at most one."""

    def __init__(self, stream: Any) -> None:
        """Draws nothing yet.

        Args:
          stream: the guarded stream of the terminal.
        """
        self.stream = stream
        self._lines: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Number of columns that may be drawn now: one less than the terminal has, so that no line is wrapped."""
        try:
            found = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            found = 0
        return (found or _USUAL_COLUMNS) - 1

    def draw(self, lines: Sequence[str]) -> None:
        """Replaces what is drawn; nothing is drawn while a line of text is not complete."""
        with _drawing:
            if _region is not self or tuple(lines) == self._lines:
                return
            erasing = self._erasing()
            self._lines = () if _is_line_open else tuple(lines)
            self.stream.draw(erasing + "\n".join(self._lines))  # at once, so that it does not flicker
            self.stream.flush()

    def erase(self) -> None:
        """Erases what is drawn."""
        with _drawing:
            if self._lines:
                self.stream.draw(self._erasing())
                self.stream.flush()
                self._lines = ()

    def _erasing(self) -> str:
        """Control characters that erase what is drawn; the cursor is behind its last line."""
        if not self._lines:
            return ""
        return "\r" + (f"\033[{len(self._lines) - 1}A" if len(self._lines) > 1 else "") + "\033[J"


@contextlib.contextmanager
def region() -> Iterator[Region]:
    """A region on stderr, which must be guarded; it is erased at the end."""
    global _region
    before, drawn = _region, Region(sys.stderr)
    _region = drawn
    try:
        yield drawn
    finally:
        drawn.erase()
        _region = before


def draw_no_more() -> None:
    """Erases what is drawn, for good: to be called before text is written otherwise than by Python's streams."""
    global _region
    with _drawing:
        if _region is not None:
            _region.erase()
            _region = None


def can_draw() -> bool:
    """Whether a person looks at stderr: it is a terminal that can erase lines. If stdout is a pipe, its reader may
    print on the same terminal, as `tee` and `less` do: then it must not be drawn on."""
    if not isinstance(sys.stderr, _Guarded) or os.environ.get("TERM", "") in _UNABLE_TERMINALS:
        return False
    return _is_terminal(sys.stderr) and not _is_pipe(sys.stdout)


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return _is_terminal(sys.stdout)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):  # closed, or replaced by something else
        return False


def _is_pipe(stream: Any) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file, as in a notebook
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


@contextlib.contextmanager
def recorded_by(record: Callable[[str], None]) -> Iterator[None]:
    """Within the context, `record` gets all text that is printed to guarded streams, in pieces, in any thread."""
    global _recorder
    before, _recorder = _recorder, record
    try:
        yield
    finally:
        _recorder = before


def only_record(line: str) -> None:
    """Gives a line, without its end, to what records the output (`recorded_by`); prints nothing."""
    if _recorder is not None:
        _recorder(f"{line}\n")


def only_results_follow() -> None:
    """Says that the work of this command is done and its files are written: what is left is to print results."""
    global _only_results_follow
    _only_results_follow = True


@contextlib.contextmanager
def guarded_output(*, goes_on: bool) -> Iterator[None]:
    """Guards stdout and stderr within the context; it can also be used as a decorator.

    A reader that has ended (`| head`), a full disk behind stdout, or a stream that is closed or absent must not look
    like an error of the code that prints.

    Args:
      goes_on: whether text that cannot be written is dropped, which is reported once on stderr.

    Raises:
      OutputLost: printed text cannot be written, unless `goes_on`.
    """
    global _only_results_follow
    before = sys.stdout, sys.stderr
    _only_results_follow = False
    with open(os.devnull, "w") as nothing:  # for streams that are absent
        out = cast(TextIO, _Guarded(sys.stdout or nothing, "stdout", goes_on=goes_on))
        err = cast(TextIO, _Guarded(sys.stderr or nothing, "stderr", goes_on=True))
        sys.stdout, sys.stderr = out, err
        try:
            yield
            out.flush()
        except SystemExit:  # as after `--help`: what is printed is lost, too, if nobody flushes it here
            out.flush()
            raise
        finally:
            if sys.stdout is out:  # otherwise other code has replaced it since, and will restore it
                sys.stdout = before[0]
            if sys.stderr is err:
                sys.stderr = before[1]
