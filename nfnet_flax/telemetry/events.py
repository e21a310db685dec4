"""The record of when a run started, worked, waited and ended: `events.jsonl` in its folder.

Each line is a JSON object: `event`, `at_s` (seconds since 1970), `session` (the same in all lines of one start of the
run), `step` (number of updates done), and `seconds`: how the time since the previous line of the session was spent, by
category; in the first line, the time since the process began. So the seconds of a session add up to its duration. A
line is handed to the operating system at once, so that a process that is killed loses only what is not recorded yet.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any, Literal

from nfnet_flax.messages import warn

Event = Literal["start", "restored", "interval", "evaluated", "saved", "stopped", "finished", "failed"]
"""`start` is the first line of a session, and tells the number of processes, devices and the versions; `restored` the
step from which it continues; `interval` comes at log steps, and where nothing else comes for ten seconds; `saved` when
the writing of a checkpoint begins; the last three end a session. A session without one of these was killed."""


class EventLog:
    """Appends to the record of a run. If it cannot be written, this is said once, and the run goes on without it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session = secrets.token_hex(4)
        self._file: int | None = None
        self._has_failed = False

    def write(self, event: Event, at_s: float, step: int, seconds: dict[str, float], facts: dict[str, Any]) -> None:
        """Appends a line; `facts` are further entries of it."""
        if self._has_failed:
            return
        line = {"event": event, "at_s": round(at_s, 3), "session": self._session, "step": step}
        line |= {"seconds": {name: round(value, 4) for name, value in seconds.items()}} | facts
        try:
            if self._file is None:
                self._file = self._open()
            text = (json.dumps(line) + "\n").encode()
            if os.write(self._file, text) != len(text):
                raise OSError("the disk is full")
        except OSError as error:
            self._has_failed = True
            warn(f"{self._path} cannot be written ({error}): what is missing there, nfnet report cannot show")

    def _open(self) -> int:
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a line that was cut short when a process was killed
            os.write(file, b"\n")
        return file

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
