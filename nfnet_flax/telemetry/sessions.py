"""Reads `events.jsonl`, in which a run records what it did and when. A session is one start of the command `nfnet
train`, until its end."""

import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nfnet_flax.telemetry.events import Event
from nfnet_flax.telemetry.json_lines import read_lines, wrong_format
from nfnet_flax.telemetry.ledger import CATEGORIES, Category

Ending = Literal["finished", "stopped", "failed"]
_ENDINGS: tuple[Ending, ...] = typing.get_args(Ending)
_EVENTS: tuple[Event, ...] = typing.get_args(Event)
_LINE_BEGINS = b'{"event"'
_MAX_TIME_S = 1e11
"""Later times, in seconds since 1970, have no date."""
_SESSION = re.compile("[0-9a-f]{8}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the file: how the time since the line before it, or since the session began, was spent."""

    event: Event
    at_s: float
    """When it was written, in seconds since 1970."""
    step: int
    """Number of updates done."""
    seconds: dict[Category, float]
    """Category -> seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a session records about itself when it begins."""

    began_at_s: float
    """When its process started, in seconds since 1970."""
    num_steps: int
    """Number of updates of the whole run, as this session knew it."""
    num_processes: int
    num_devices: int
    """Of all processes."""
    device_kind: str
    host: str
    """Name of the host of process 0."""
    versions: dict[str, str]
    """Name of a package -> its version."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """One start of a run, until its end."""

    began_at_s: float
    """When it began, in seconds since 1970."""
    start: Start | None
    """What it recorded at its start; None: that line cannot be read."""
    lines: tuple[Line, ...]
    """All lines that can be read, at least one."""
    reason: str | None
    """Why it stopped or failed, as it recorded it; None: it did not."""

    @property
    def from_step(self) -> int | None:
        """Step from which it continued, 0 for a new run; None: it ended before that, or that line cannot be read."""
        return next((line.step for line in self.lines if line.event == "restored"), None)

    @property
    def last_at_s(self) -> float:
        """Time of its last line, in seconds since 1970."""
        return self.lines[-1].at_s

    @property
    def last_step(self) -> int:
        """Number of updates done at its last line; of the whole run, except before it has restored a checkpoint."""
        return self.lines[-1].step

    @property
    def ending(self) -> Ending | None:
        """How it ended; None: it was killed, or has not ended yet."""
        last = self.lines[-1].event
        return next((ending for ending in _ENDINGS if ending == last), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """The contents of an `events.jsonl`."""

    sessions: tuple[Session, ...]
    """In the order in which they began."""
    unread_lines: tuple[int, ...] = ()
    """Numbers, from 1, of lines that cannot be read: cut short by a kill, or damaged."""
    num_late: int = 0
    """Number of lines that a session wrote after the next one had begun, because its process was suspended meanwhile.
    They are left out: the run did not belong to it any more."""


def read_history(path: Path) -> History:
    """Reads an `events.jsonl`, also of a run that is training.

    Args:
      path: the file; if it does not exist, there are no sessions.

    Raises:
      ConfigError: a line is complete, but not in the format of this version; or a folder has the name of the file.
      StorageFailed: the file cannot be opened or read.
    """
    lines, unread = read_lines(path, _LINE_BEGINS)
    of_session: dict[str, list[tuple[Line, dict[str, Any]]]] = {}
    newest, num_late = "", 0
    for number, data in lines:
        try:
            session, line = _line_of(data)
            if session in of_session and session != newest:
                num_late += 1
                continue
            before = of_session.setdefault(session, [])
            _check_order(line, [line for line, _ in before])
        except _WrongFormat as error:
            raise wrong_format(path, number, str(error)) from error
        before.append((line, data))
        newest = session
    return History(sessions=tuple(map(_session_of, of_session.values())), unread_lines=tuple(unread), num_late=num_late)


class _WrongFormat(Exception):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """A line is not in the format."""


def _line_of(data: dict[str, Any]) -> tuple[str, Line]:
    """The session and the value of a line; raises `_WrongFormat`."""
    event, session, seconds = data.get("event"), data.get("session"), data.get("seconds")
    _require(event in _EVENTS, "event", event)
    _require(isinstance(session, str) and _SESSION.fullmatch(session) is not None, "session", session)
    _require(isinstance(seconds, dict), "seconds", seconds)
    assert isinstance(session, str)
    assert isinstance(seconds, dict)
    for name, value in seconds.items():
        _require(name in CATEGORIES and _is_number(value) and value >= 0, f"seconds.{name}", value)
    _require(_is_time(data.get("at_s")), "at_s", data.get("at_s"))
    _require(_is_count(data.get("step")), "step", data.get("step"))
    if event == "start":
        _require(_is_time(data.get("began_at_s")), "began_at_s", data.get("began_at_s"))
        for name in ("num_steps", "num_processes", "num_devices"):
            _require(_is_count(data.get(name)), name, data.get(name))
        for name in ("device_kind", "host"):
            _require(isinstance(data.get(name), str), name, data.get(name))
        versions = data.get("versions")
        is_named = isinstance(versions, dict) and all(isinstance(value, str) for value in versions.values())
        _require(is_named, "versions", versions)
    return session, Line(event=typing.cast(Event, event), at_s=float(data["at_s"]), step=data["step"], seconds=seconds)


def _check_order(line: Line, before: Sequence[Line]) -> None:
    """Raises `_WrongFormat` if a line cannot follow those before it in its session."""
    if not before:
        return
    if line.event == "start" or before[-1].event in _ENDINGS:
        raise _WrongFormat(f"{line.event!r} follows {before[-1].event!r} in the same session")
    if line.step < before[-1].step:
        raise _WrongFormat(f"step {line.step} follows step {before[-1].step} in the same session")


def _session_of(read: Sequence[tuple[Line, dict[str, Any]]]) -> Session:
    (first, data), lines = read[0], tuple(line for line, _ in read)
    start = None
    if first.event == "start":
        start = Start(**{field.name: data[field.name] for field in dataclasses.fields(Start)})
    began_at_s = first.at_s - sum(first.seconds.values()) if start is None else start.began_at_s
    reason = read[-1][1].get("reason")
    return Session(began_at_s=began_at_s, start=start, lines=lines, reason=reason if isinstance(reason, str) else None)


def _require(condition: bool, name: str, value: object) -> None:
    if not condition:
        raise _WrongFormat(f"{name} = {value!r}" if value is not None else f"{name} is missing")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(typing.cast(float, value))


def _is_time(value: object) -> bool:
    return _is_number(value) and 0 <= typing.cast(float, value) <= _MAX_TIME_S


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
