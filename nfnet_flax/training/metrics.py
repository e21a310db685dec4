"""Metrics on disk: `metrics.jsonl`, and TensorBoard's event files. After a resume each (step, metric) is there once.

`metrics.jsonl` holds a JSON object for each step that has metrics: `step`, an integer, and numbers by name. A number
that is not finite is written as `null`, because JSON cannot represent it.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import write_whole
from nfnet_flax.messages import warn
from nfnet_flax.telemetry.about import About
from nfnet_flax.training import layout
from nfnet_flax.training.event_files import tidy_events
from nfnet_flax.training.event_writer import EventWriter, Histograms, Images, Texts, open_events, prepare_events
from nfnet_flax.training.storage import storage_errors

Row = dict[str, Any]
"""`step` and the metrics of that step by name: numbers, or None for one that is not finite."""
OnMetrics = Callable[[int, dict[str, float]], None]
"""Function that takes a step and metrics by name."""
OF_THE_MACHINE = ("throughput/", "time/", "memory/", "processes/")
"""Beginnings of the names of metrics that depend on the machine. All others are the same whenever a run is repeated."""
_ROW_BEGINS = b'{"step"'


class NoMetrics:
    """Replaces `MetricsLog` in processes that write no metrics."""

    @property
    def has_events(self) -> bool:
        """False: nothing is written for TensorBoard."""
        return False

    def open_events(self) -> None:
        """Does nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def write_images(self, step: int, images: Images) -> None:
        """Does nothing."""

    def write_texts(self, step: int, texts: Texts) -> None:
        """Does nothing."""

    def write_histograms(self, step: int, histograms: Histograms) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class MetricsLog:
    """Writes one JSON object per step and, with `tensorboard`, the same numbers as TensorBoard scalars.

    Opening it at `resume_step` removes what an earlier process wrote for later steps, and the evaluation of this step
    unless it was `evaluated` before the checkpoint: these will be repeated. If the file is damaged, its good rows are
    kept, and a copy of the damaged file is kept in `damaged/`.

    Raises (also by each method):
      StorageFailed: a file cannot be read or written; the message names it.
      ConfigError: a folder has the name of a file, or the reverse.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        evaluated: bool,
        tensorboard: bool,
        on_metrics: OnMetrics | None = None,
        about: About | None = None,
    ) -> None:
        self._path = workdir / layout.METRICS
        self._on_metrics = on_metrics

        def stands(step: int, name: str) -> bool:
            # The first batch, which is shown at step 0, is read again by a run that begins again.
            return step < resume_step or (step == resume_step > 0 and (evaluated or not name.startswith("eval")))

        found = read_metrics(self._path)
        if found.damaged_lines:
            _keep_damaged(workdir, found.damaged_lines)
        rows = [
            {name: value for name, value in row.items() if name == "step" or stands(row["step"], name)}
            for row in found.rows
            if row["step"] <= resume_step
        ]
        rows = [row for row in rows if len(row) > 1]
        # The object of this step may still be completed, by the evaluation that is due at this step.
        self._written: Row = rows[-1] if rows and rows[-1]["step"] == resume_step else {}
        """The last line of the file if it is of the current step; empty if there is none yet."""
        self._row: Row = self._written or {"step": resume_step}
        self._file = self._replaced_by([_line(row) for row in rows])
        self._opening: Future[EventWriter | None] | None = None
        try:
            name = prepare_events(workdir) if tensorboard else None
        except BaseException:
            self._file.close()
            raise

        self._tidy = functools.partial(tidy_events, workdir, stands, rows if tensorboard else [])

        def open_tidied() -> EventWriter | None:
            self._tidy()
            return None if name is None else open_events(workdir, name, about)

        self._open_events = open_tidied
        """Imports TensorFlow, which takes seconds."""

    def open_events(self) -> None:
        """Begins to make TensorBoard's files ready, in a thread; what is written later waits for it.

        To be called when nothing else waits for the processor: while the first step compiles, or after it.
        """
        if self._opening is None:
            pool = ThreadPoolExecutor(1, "event files")
            self._opening = pool.submit(self._open_events)
            pool.shutdown(wait=False)

    @property
    def has_events(self) -> bool:
        """Whether files for TensorBoard are written, by the recipe and as TensorFlow is there."""
        return self._opened_events() is not None

    def _opened_events(self) -> EventWriter | None:
        self.open_events()
        assert self._opening is not None
        return self._opening.result()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics of a step; steps must not decrease."""
        if step != self._row["step"]:
            self._emit()
            self._row, self._written = {"step": step}, {}
        self._row = self._row | {name: _finite(value) for name, value in metrics.items()}
        if (events := self._opened_events()) is not None:
            events.write(step, metrics)
        if self._on_metrics is not None:
            self._on_metrics(step, dict(metrics))

    def write_images(self, step: int, images: Images) -> None:
        """Adds images of a step, (H, W, 3) uint8 by tag, for TensorBoard alone: without it, nothing is written.

        After a resume they are kept or removed as metrics are: a tag of an evaluation has to begin with `eval`.
        """
        if (events := self._opened_events()) is not None:
            events.write_images(step, images)

    def write_texts(self, step: int, texts: Texts) -> None:
        """Adds texts of a step, Markdown by tag; otherwise as `write_images`."""
        if (events := self._opened_events()) is not None:
            events.write_texts(step, texts)

    def write_histograms(self, step: int, histograms: Histograms) -> None:
        """Adds histograms of a step: by tag, (N,) values. Those that are not finite are left out, and a tag without
        any other, too. Otherwise as `write_images`."""
        if (events := self._opened_events()) is not None:
            events.write_histograms(step, histograms)

    def _emit(self) -> None:
        if len(self._row) == 1 or self._row == self._written:
            return
        with storage_errors(self._path, OSError):
            if self._written:
                self._file.close()
                *lines, _ = self._path.read_bytes().splitlines(keepends=True)
                self._file = self._replaced_by([*lines, _line(self._row)])
            else:
                self._file.write(_line(self._row))
        self._written = self._row

    def _replaced_by(self, lines: list[bytes]) -> BinaryIO:
        # A process may be killed at any moment: the file must always contain the lines on which a checkpoint relies.
        with storage_errors(self._path, OSError):
            write_whole(self._path, b"".join(lines))
            return self._path.open("ab")

    def flush(self) -> None:
        """Writes everything to disk; to be called before a checkpoint is saved, which must not be newer than its
        metrics."""
        self._emit()
        with storage_errors(self._path, OSError):
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._opening is not None and (events := self._opening.result()) is not None:
            events.flush()

    def close(self) -> None:
        """Flushes and closes; if one of these fails, the other is done nevertheless."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._close_file)
            closing.callback(self._close_events)
            self.flush()

    def _close_events(self) -> None:
        if self._opening is None:  # nothing was written
            self._tidy()
        elif (events := self._opening.result()) is not None:
            events.close()

    def _close_file(self) -> None:
        with storage_errors(self._path, OSError):
            self._file.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsFile:
    """The contents of a `metrics.jsonl`."""

    rows: list[Row]
    """One row for each step, in order."""
    damaged_lines: list[int]
    """Numbers, from 1, of damaged lines; good rows may be before and after them, and even at their end."""


def read_metrics(path: Path) -> MetricsFile:
    """Reads a `metrics.jsonl`. Every reader of metrics uses this, or `read_rows`.

    A last line that was cut short when a process was killed is ignored and does not count as damage. If a (step,
    metric) is there twice, the later value counts.

    Raises:
      ConfigError: a folder has the name of the file.
      StorageFailed: the file cannot be opened or read.
    """
    with storage_errors(path, OSError):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return MetricsFile(rows=[], damaged_lines=[])
        except IsADirectoryError as error:
            raise ConfigError(f"{path} is a folder, but metrics are written there: move it away") from error
    *lines, last = content.split(b"\n")
    if last and not last.startswith(b"{"):
        lines.append(last)
    by_step: dict[int, Row] = {}
    damaged = []
    for number, line in enumerate(lines, start=1):
        row, is_whole = _parse(line)
        if row is not None:
            by_step[row["step"]] = by_step.get(row["step"], {}) | row
        if not is_whole:
            damaged.append(number)
    return MetricsFile(rows=[by_step[step] for step in sorted(by_step)], damaged_lines=damaged)


def read_rows(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, as `read_metrics` reads them."""
    return read_metrics(path).rows


def _parse(line: bytes) -> tuple[Row | None, bool]:
    """The row of a line, if there is one, and whether the line is undamaged, that is, contains nothing else."""
    if not line.strip():
        return None, True
    row = _row_of(line)
    if row is not None:
        return row, True
    # Blocks that were never written, as after a power failure, end in the middle of a line: the row after them is good.
    start = line.rfind(_ROW_BEGINS)
    return (_row_of(line[start:]) if start > 0 else None), False


def _row_of(text: bytes) -> Row | None:
    try:
        row = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    if not all(value is None or type(value) in (int, float) for value in row.values()):
        return None
    return {name: _finite(value) for name, value in row.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _line(row: Row) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _keep_damaged(workdir: Path, lines: list[int]) -> None:
    path = workdir / layout.METRICS
    with storage_errors(path, OSError):
        kept = layout.free_place(workdir, layout.METRICS)
        write_whole(kept, path.read_bytes())
    first = f"line {lines[0]}" if len(lines) == 1 else f"{len(lines)} lines, the first of them {lines[0]},"
    warn(f"{path} is damaged: {first} cannot be read; the good rows stay, and the file as it was is kept as {kept}")
