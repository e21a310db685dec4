"""Keeps what `nfnet train` prints, and the tracebacks of unexpected errors of all commands, which are not printed.

A run has a file for each start and process (`training.run_log`). Until that is known, lines are kept in memory. The
traceback of an error of another command goes to a file in the user's cache.
"""

import collections
import contextlib
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nfnet_flax.messages import warn
from nfnet_flax.output import recorded_by
from nfnet_flax.paths import user_cache
from nfnet_flax.verbosity import time_text

_MAX_LINES_KEPT = 10_000
"""Number of lines that are kept in memory: the last ones."""
_MAX_FILES_KEPT = 20
"""Number of files in the user's cache: the newest ones."""


class SessionLog:
    """The lines that this process prints, each with its time."""

    def __init__(self) -> None:
        self._waiting: collections.deque[str] = collections.deque(maxlen=_MAX_LINES_KEPT)
        self._begun: dict[int, str] = {}
        """Thread -> the line that it has not ended yet."""
        self._path: Path | None = None
        self._named = ""
        self._file: IO[str] | None = None
        self._lock = threading.RLock()
        self._kept: tuple[BaseException, str] | None = None

    def record(self, text: str) -> None:
        """Adds text that is printed, in pieces."""
        with self._lock:
            *lines, begun = (self._begun.pop(threading.get_ident(), "") + text).split("\n")
            if begun:
                self._begun[threading.get_ident()] = begun
            for line in lines:
                self._add(line)

    def open(self, path: Path, named: str) -> None:
        """Writes the lines so far, and all that follow, to a file, which is made with the first of them.

        Args:
          path: the file; its folder is made.
          named: the file as the user knows it.
        """
        with self._lock:
            self._path, self._named = path, named
            waiting, self._waiting = list(self._waiting), collections.deque(maxlen=_MAX_LINES_KEPT)
            for line in waiting:
                self._write(line)

    def close(self) -> None:
        """Ends writing to the file; lines that follow are kept in memory."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._path = self._file = None

    def keep_traceback(self, error: BaseException) -> bool:
        """Writes the traceback of an error to the file; False if there is none, or it cannot be written."""
        with self._lock:
            if self._path is not None:
                self.record("".join(traceback.format_exception(error)))
            if self._file is not None:
                self._kept = error, self._named
            return self._file is not None

    def forget_traceback(self) -> None:
        """To be called if the file does not reach the user."""
        self._kept = None

    def place_of(self, error: BaseException) -> str | None:
        """The file with the traceback of an error; None if it is in none."""
        if self._kept is not None and self._kept[0] is error:
            return self._kept[1]
        return self._named if self.keep_traceback(error) else None

    @property
    def file(self) -> IO[str] | None:
        """The file; None if nothing was written to one."""
        return self._file

    def lines(self) -> list[str]:
        """The lines that are in no file."""
        return list(self._waiting)

    def _add(self, line: str) -> None:
        stamped = f"{time_text()} {line}\n"
        if self._path is None:
            self._waiting.append(stamped)
        else:
            self._write(stamped)

    def _write(self, line: str) -> None:
        try:
            if self._file is None and self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", errors="backslashreplace", buffering=1)
            if self._file is not None:
                self._file.write(line)
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
