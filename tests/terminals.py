"""A terminal whose screen tests can look at: a pseudo terminal, whose bytes `pyte` draws."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import pyte

_TIMEOUT_S = 60.0


class Terminal:
    """A terminal for a process, or for the streams of this one; to be made by `opened`."""

    def __init__(self, columns: int, lines: int) -> None:
        self._master, self.file = pty.openpty()
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lines = lines
        self.written = b""
        """All bytes so far."""
        self.frames: list[list[str]] = []
        """The screen after each piece that was written: its lines without spaces and empty lines at their end."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._set_size(columns)
        self._thread.start()

    def resize(self, columns: int) -> None:
        """Changes the width, as when a window is resized."""
        self._set_size(columns)
        self._screen.resize(self._lines, columns)

    def _set_size(self, columns: int) -> None:
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", self._lines, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                content = os.read(self._master, 65536)
            except OSError:  # nobody has it open any more
                return
            self.written += content
            self._stream.feed(content)
            self.frames.append(self.lines())

    def lines(self) -> list[str]:
        """The screen now."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def wait_for(self, is_shown: Callable[[list[str]], bool], since: int = 0) -> list[str]:
        """Waits for a screen, from the given number of screens on, and returns it."""
        end = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < end:
            for frame in self.frames[since:]:
                if is_shown(frame):
                    return frame
            time.sleep(0.01)
        raise AssertionError(f"the screen is {self.lines()}")

    def end(self) -> list[str]:
        """Waits until all is read that was written by processes that have ended; returns the screen."""
        os.close(self.file)
        self._thread.join(_TIMEOUT_S)
        assert not self._thread.is_alive()
        os.close(self._master)
        return self.lines()

    @contextlib.contextmanager
    def used(self, *, also_stdout: bool = True) -> Iterator[None]:
        """Within the context, this process prints to the terminal."""
        before = sys.stdout, sys.stderr
        streams: list[TextIO] = [os.fdopen(os.dup(self.file), "w", buffering=1) for _ in range(2)]
        sys.stderr = streams[0]
        if also_stdout:
            sys.stdout = streams[1]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in streams:
                with contextlib.suppress(OSError):  # the terminal has gone away
                    stream.close()


def opened(columns: int = 80, lines: int = 24) -> Terminal:
    """A new terminal."""
    return Terminal(columns, lines)
