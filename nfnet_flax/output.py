"""What a command or a run prints: a failure to print must not end the run."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class OutputLost(Exception):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """Printed text could not be written; the cause of this exception says why."""


class _Guarded:
    """A text stream whose failures are reported once on stderr, or raised as `OutputLost`."""

    def __init__(self, stream: TextIO, name: str, *, goes_on: bool) -> None:
        self._stream = stream
        self._name = name
        self._goes_on = goes_on
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text; characters that the stream's encoding does not have are written as escapes."""
        self._attempt(lambda: self._write(text))
        return len(text)

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
            if not self._has_failed:
                self._has_failed = True
                print(f"nfnet: {self._name} cannot be written ({error}); the run goes on without it", file=sys.stderr)


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
    before = sys.stdout, sys.stderr
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
