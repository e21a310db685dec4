"""Gives the metrics of a run to its trackers, each in a thread of its own: none can end the run or make it wait.

What each tracker was given is on record in a file, so that a run that continues gives each row of metrics once. Rows
that a tracker has missed, as its service could not be reached or it is new in the recipe, are given at the next start.
"""

import contextlib
import dataclasses
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed, json_content, read_json
from nfnet_flax.messages import warn
from nfnet_flax.open_config import type_name
from nfnet_flax.telemetry.flat_recipe import Scalar
from nfnet_flax.telemetry.trackers import END_WAIT_S, Outcome, RunEnd, RunStart, Tracker

MAX_WAITING = 1000
"""Largest number of rows that wait for a tracker."""
SETTLE_S = 60.0
"""Time after which a row is taken to be stored by a tracker that does not store rows at once, in seconds."""

Mark = tuple[int, bool]
"""A row of metrics: its step, and whether it is of the evaluation, which comes after the other metrics of the step."""
Row = Mapping[str, Any]
"""`step`, and metrics by name; None for one that is not finite."""
_BEFORE_ALL: Mark = (-1, False)
_given_up: list[threading.Thread] = []
"""Threads of runs that are over."""


def is_any_stuck() -> bool:
    """Whether a thread of this process still waits for a tracker although its run is over.

    Libraries wait at the end of a Python program, some of them for ever: such a program has to be left by `os._exit`.
    """
    return any(thread.is_alive() for thread in _given_up)


class Tracking:
    """The trackers of one run; made by `tracking`."""

    def __init__(
        self, trackers: Sequence[Tracker], about: RunStart, record: Path, read_rows: Callable[[], Sequence[Row]]
    ) -> None:
        self._about = about
        self._record = _Record(record)
        self._read_rows = read_rows
        self._end = RunEnd(outcome="failed", reason="", step=0, metrics={})
        self._step = 0
        self._workers: list[_Worker] = []
        kinds = [type_name(type(tracker)) for tracker in trackers]
        self._named = {
            kind if (number := kinds[:index].count(kind)) == 0 else f"{kind}-{number + 1}": tracker
            for index, (kind, tracker) in enumerate(zip(kinds, trackers, strict=True))
        }

    def begin(self, step: int) -> None:
        """Opens the trackers, in their threads; to be called when `step` updates are done and the run goes on."""
        self._step = step
        if not self._named:
            return
        rows = self._read_rows()
        self._record.read()
        for key, tracker in self._named.items():
            given = self._record.given.get(key)
            start = dataclasses.replace(self._about, step=step, run_id=given.run_id if given else None)
            self._workers.append(_Worker(key, tracker, start, self._record, rows))

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives metrics of a step to all trackers, without waiting for them."""
        self._step = step
        for worker in self._workers:
            worker.put(step, metrics)

    def ends(self, outcome: Outcome, step: int, metrics: Mapping[str, float], reason: str = "") -> None:
        """Tells how the run ends, if nothing fails until then; the arguments are those of `RunEnd`."""
        self._end = RunEnd(outcome=outcome, reason=reason, step=step, metrics=metrics)

    def close(self, error: BaseException | None) -> None:
        """Ends all trackers, and waits for them, but not for long."""
        end = self._end
        if error is not None:
            end = RunEnd(outcome="failed", reason=_brief(error), step=self._step, metrics={})
        for worker in self._workers:
            worker.end(end)
        until_s = time.monotonic() + END_WAIT_S
        for worker in self._workers:
            worker.wait(until_s)

    def abandon(self) -> None:
        """Ends all threads, without telling the trackers: another process continues the run."""
        for worker in self._workers:
            worker.abandon()


@contextlib.contextmanager
def tracking(
    trackers: Sequence[Tracker],
    *,
    name: str,
    recipe: Mapping[str, Scalar],
    folder: Path,
    record: Path,
    read_rows: Callable[[], Sequence[Row]],
    silent_after: type[BaseException],
) -> Iterator[Tracking]:
    """The trackers of a run; leaving the context ends them.

    Args:
      trackers: of the recipe; empty in processes other than the first.
      name: name of the run.
      recipe: fields of the recipe by name.
      folder: for files of the trackers; made when the first one is opened.
      record: file that says what each tracker was given.
      read_rows: returns the metrics of the steps that are done when the run begins or continues; only called then, if
        there is a tracker.
      silent_after: an error after which nothing is written or given, because another process has taken the run over.
    """
    about = RunStart(name=name, recipe=recipe, step=0, run_id=None, folder=folder)
    found = Tracking(trackers, about, record, read_rows)
    try:
        yield found
    except BaseException as error:
        if isinstance(error, silent_after):
            found.abandon()
        else:
            found.close(error)
        raise
    found.close(None)


class _Worker:
    """Calls one tracker, in a thread."""

    def __init__(self, key: str, tracker: Tracker, start: RunStart, record: "_Record", rows: Iterable[Row]) -> None:
        self._key = key
        self._tracker = tracker
        self._start = start
        self._record = record
        self._rows = rows
        self._waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]] | RunEnd] = queue.SimpleQueue()
        self._is_full = self._is_abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {key}", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives a row, unless the thread has ended, or too many rows wait."""
        if not self._thread.is_alive():
            return
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put((step, metrics))
        elif not self._is_full:
            self._is_full = True
            warn(f"{self._key} does not keep up: {MAX_WAITING} rows of metrics wait, and it does not get all others")

    def end(self, end: RunEnd) -> None:
        """Ends the run after the rows that wait."""
        self._waiting.put(end)

    def wait(self, until_s: float) -> None:
        """Waits for the end of the thread until a time of `time.monotonic`; then it is given up."""
        self._thread.join(max(0.0, until_s - time.monotonic()))
        if self._thread.is_alive():
            self.abandon()
            _given_up.append(self._thread)
            warn(
                f"{self._key} was not ready {END_WAIT_S:g} s after the end of the run, and is not waited for any longer"
            )

    def abandon(self) -> None:
        """Gives nothing any more, and writes nothing on record."""
        self._is_abandoned = True
        self._waiting.put(RunEnd(outcome="failed", reason="", step=0, metrics={}))  # wakes the thread

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:  # also SystemExit, which a library may raise
            if not self._is_abandoned:
                warn(f"{self._key} gets no metrics from now on, and the run goes on without it: {_brief(error)}")

    def _follow(self) -> None:
        self._start.folder.mkdir(exist_ok=True)
        run = self._tracker.open(self._start)
        before = self._record.given.get(self._key)
        given = before.mark if before is not None and run.run_id == self._start.run_id else _BEFORE_ALL
        self._note(run.run_id, given)
        unsettled: deque[tuple[float, Mark]] = deque()
        for row in self._all_rows():
            if self._is_abandoned:
                return
            if isinstance(row, RunEnd):
                run.close(row)
                if unsettled:
                    self._note(run.run_id, unsettled[-1][1])
                return
            for mark, metrics in _parts(*row):
                if mark > given:
                    run.on_metrics(mark[0], metrics)
                    unsettled.append((time.monotonic(), mark))
            settle_s = 0.0 if self._tracker.stores_at_once else SETTLE_S
            settled = None
            while unsettled and time.monotonic() - unsettled[0][0] >= settle_s:
                settled = unsettled.popleft()[1]
            if settled is not None:
                self._note(run.run_id, settled)

    def _all_rows(self) -> Iterator[tuple[int, Mapping[str, float]] | RunEnd]:
        for row in self._rows:
            metrics = {name: math.nan if value is None else value for name, value in row.items() if name != "step"}
            yield row["step"], metrics
        self._rows = ()
        while True:
            yield self._waiting.get()

    def _note(self, run_id: str | None, given: Mark) -> None:
        if not self._is_abandoned:
            self._record.note(self._key, Given(run_id, given))


def _parts(step: int, metrics: Mapping[str, float]) -> Iterator[tuple[Mark, dict[str, float]]]:
    """The metrics of a step that are not of its evaluation, and then those that are."""
    for is_evaluation in (False, True):
        part = {name: value for name, value in metrics.items() if name.startswith("eval") == is_evaluation}
        if part:
            yield (step, is_evaluation), part


@dataclasses.dataclass(frozen=True)
class Given:
    """What is on record about one tracker."""

    run_id: str | None
    """What the tracker calls the run."""
    mark: Mark
    """The last row that it has stored."""


def read_record(path: Path) -> dict[str, Given]:
    """What is on record about each tracker of a run, by its name; empty if there is no record.

    Raises:
      ConfigError: it is damaged.
      StorageFailed: it cannot be read.
    """
    if not path.exists():
        return {}
    remedy = "move it away; trackers then begin new runs"
    found = {}
    for key, entry in read_json(path, remedy).items():
        match entry:
            case {"run_id": str() | None as run_id, "step": int() as step, "evaluated": bool() as evaluated}:
                found[key] = Given(run_id, (step, evaluated))
            case _:
                raise ConfigError(f"{path} is damaged ({key} is {entry!r}): {remedy}")
    return found


class _Record:
    """The file that says what each tracker calls the run, and which rows it has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.given: dict[str, Given] = {}
        """By the name of a tracker."""

    def read(self) -> None:
        """Reads the file; if it cannot be read, a warning says so, and trackers begin new runs."""
        try:
            self.given = read_record(self._path)
        except (ConfigError, StorageFailed) as error:
            warn(f"trackers begin new runs: {error}")

    def note(self, key: str, given: Given) -> None:
        """Writes down what a tracker has."""
        with self._lock:
            self.given[key] = given
            entries = {
                name: {"run_id": each.run_id, "step": each.mark[0], "evaluated": each.mark[1]}
                for name, each in self.given.items()
            }
            # Not `write_whole`, which waits for the disk: rows may come many times a second.
            partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
            partial.write_bytes(json_content(entries))
            partial.replace(self._path)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
