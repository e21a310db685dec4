"""Keeps what `nfnet train` prints, and the tracebacks of unexpected errors of all commands, which are not printed.

A run has a file for each start and process (`training.run_log`). Until that is known, lines are kept in memory. The
traceback of an error of another command goes to a file in the user's cache.
"""

import collections
import contextlib
import errno
import faulthandler
import io
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from nfnet_flax.messages import warn
from nfnet_flax.output import recorded_by
from nfnet_flax.paths import user_cache
from nfnet_flax.storage.background import BackgroundThreads
from nfnet_flax.verbosity import time_text

T = TypeVar("T")

_MAX_LINES_KEPT = 10_000
"""Number of lines that are kept in memory: the last ones."""
_MAX_FILES_KEPT = 20
"""Number of files in the user's cache: the newest ones."""
_WAIT_S = 1.0
"""Longest time for which whoever prints waits for the file. A disk that hangs must not keep a run from ending."""
_TRACEBACK_WAIT_S = 10.0


class SessionLog:
    """The lines that this process prints, each with its time; a thread of its own writes them."""

    def __init__(self) -> None:
        self._begun: dict[int, str] = {}
        """Thread -> the line that it has not ended yet."""
        self._lock = threading.Lock()  # guards the lines that are begun
        self._kept: tuple[BaseException, str] | None = None
        self._writer = BackgroundThreads(1, "session log")
        self._last: Future[Any] | None = None
        # What follows is changed by the writer alone.
        self._waiting: collections.deque[str] = collections.deque(maxlen=_MAX_LINES_KEPT)
        self._path: Path | None = None
        self._named = ""
        self._file: io.FileIO | None = None

    def record(self, text: str) -> None:
        """Adds text that is printed, in pieces."""
        with self._lock:
            *lines, begun = (self._begun.pop(threading.get_ident(), "") + text).split("\n")
            if begun:
                self._begun[threading.get_ident()] = begun
        if lines:
            time = time_text()
            self._wait_for(self._add, [f"{time} {line}\n" for line in lines])

    def open(self, path: Path, named: str) -> None:
        """Writes the lines so far, and all that follow, to a file, which is made with the first of them.

        Args:
          path: the file; its folder is made.
          named: the file as the user knows it.
        """
        self._wait_for(self._open, path, named)

    def close(self) -> None:
        """Ends writing to the file; lines that follow are kept in memory."""
        self._wait_for(self._close)

    def keep_traceback(self, error: BaseException) -> bool:
        """Writes the traceback of an error to the file; False if there is none, or it cannot be written."""
        self.record("".join(traceback.format_exception(error)))
        named = self._wait_for(lambda: None if self._file is None else self._named, wait_s=_TRACEBACK_WAIT_S)
        if named is not None:
            self._kept = error, named
        return named is not None

    def forget_traceback(self) -> None:
        """To be called if the file does not reach the user."""
        self._kept = None

    def place_of(self, error: BaseException) -> str | None:
        """The file with the traceback of an error, which is written unless it is there; None if it is in no file."""
        is_kept = (self._kept is not None and self._kept[0] is error) or self.keep_traceback(error)
        return self._kept[1] if is_kept and self._kept is not None else None

    def keep_stacks(self) -> None:
        """Writes the stacks of all threads to the file, if there is one."""

        def write() -> None:
            if self._file is not None:
                faulthandler.dump_traceback(file=self._file, all_threads=True)

        self._wait_for(write)

    def lines(self) -> list[str]:
        """The lines that are in no file."""
        return self._wait_for(lambda: list(self._waiting)) or []

    def _wait_for(self, call: Callable[..., T], *args: Any, wait_s: float = _WAIT_S) -> T | None:
        """The result of a call that the writer makes; None if it takes too long. Nobody waits behind a call that
        hangs."""
        before, future = self._last, self._writer.submit(call, *args)
        self._last = future
        if before is not None and not before.done() and wait_s == _WAIT_S:
            return None
        with contextlib.suppress(TimeoutError):
            return future.result(wait_s)
        return None

    def _open(self, path: Path, named: str) -> None:
        self._path, self._named = path, named
        waiting, self._waiting = list(self._waiting), collections.deque(maxlen=_MAX_LINES_KEPT)
        self._add(waiting)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._path = self._file = None

    def _add(self, lines: list[str]) -> None:
        if self._path is None:
            self._waiting.extend(lines)
            return
        try:
            if self._file is None and lines:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
            content = "".join(lines).encode(errors="backslashreplace")
            if self._file is not None and self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._path = self._file = None
            warn(f"{self._named} cannot be written ({error.strerror}); what is printed is not kept from now on")


_current: SessionLog | None = None


def current() -> SessionLog | None:
    """The log of this process; None if it keeps none, as in Python code."""
    return _current


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Within the context, what is printed to guarded streams is kept."""
    global _current
    before, log = _current, SessionLog()
    _current = log
    try:
        with recorded_by(log.record):
            yield
    finally:
        log.close()
        _current = before


def place_of_traceback(error: BaseException) -> str | None:
    """The file with the traceback of an error, which is written unless it is in the log already; None if it cannot be
    written."""
    place = None if _current is None else _current.place_of(error)
    if place is not None:
        return place
    try:
        folder = user_cache("log")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time_text().replace(':', '')}-{os.getpid()}.log"
        command = shlex.join(["nfnet", *sys.argv[1:]])
        printed = [] if _current is None else _current.lines()
        text = "".join(traceback.format_exception(error))
        path.write_text(f"{command}\n{''.join(printed)}{text}", errors="backslashreplace")
        for old in sorted(folder.glob("*.log"), key=lambda found: found.name)[:-_MAX_FILES_KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return str(path)
