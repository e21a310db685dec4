"""Metrics on disk: `metrics.jsonl`, and TensorBoard through CLU. After a resume each (step, metric) stands once."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class NoMetrics:
    """Takes the place of `MetricsLog` in processes that write none."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MetricsLog:
    """Writes one JSON object per step and, with `tensorboard`, the same numbers as TensorBoard scalars.

    Opening it at `resume_step` removes what an earlier process wrote for later steps, and the evaluation of this step
    unless it was `evaluated` before the checkpoint: those are about to be repeated.
    """

    def __init__(self, workdir: Path, *, resume_step: int, evaluated: bool, tensorboard: bool) -> None:
        self._path = workdir / "metrics.jsonl"

        def stands(step: int, name: str) -> bool:
            return step < resume_step or (step == resume_step and (evaluated or not name.startswith("eval")))

        rows = [
            {name: value for name, value in row.items() if stands(row["step"], name)}
            for row in read_rows(self._path)
            if row["step"] <= resume_step
        ]
        rows = [row for row in rows if len(row) > 1]
        # An object of the very step may still be completed, by the evaluation that is due there.
        self._written: dict[str, Any] = rows[-1] if rows and rows[-1]["step"] == resume_step else {}
        """Of the current step: the last line of the file; empty if there is none yet."""
        self._row: dict[str, Any] = self._written or {"step": resume_step}
        self._file = self._replaced_by([json.dumps(row) for row in rows])
        folder = workdir / "tensorboard"
        # Before anything imports TensorFlow (TensorBoard's reader does): its notices would land in the progress line.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        drop_events(folder, stands)
        self._writer = _open_tensorboard(folder) if tensorboard else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics of a step; steps must not decrease."""
        if step != self._row["step"]:
            self._emit()
            self._row, self._written = {"step": step}, {}
        self._row = self._row | metrics
        if self._writer is not None:
            self._writer.write_scalars(step, metrics)

    def _emit(self) -> None:
        if len(self._row) == 1 or self._row == self._written:
            return
        if self._written:
            self._file.close()
            *lines, _ = self._path.read_text().splitlines()
            self._file = self._replaced_by([*lines, json.dumps(self._row)])
        else:
            self._file.write(json.dumps(self._row) + "\n")
        self._written = self._row

    def _replaced_by(self, lines: list[str]) -> TextIO:
        # A process may be killed at any moment: the file is never without a line that a checkpoint relies on.
        partial = self._path.with_suffix(".partial")
        with partial.open("w") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        return self._path.open("a")

    def flush(self) -> None:
        """Puts everything on disk; to be called before a checkpoint is, so that none is ahead of its metrics."""
        self._emit()
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Complete objects of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _open_tensorboard(folder: Path) -> Any:
    """CLU's writer, or None with one warning where TensorFlow is missing."""
    try:
        import tensorflow as tf
        from clu.metric_writers import SummaryWriter
    except ImportError as error:
        warnings.warn(
            f"only metrics.jsonl is written, no TensorBoard files ({error}): pip install tensorflow-cpu tensorboard",
            stacklevel=2,
        )
        return None
    tf.config.set_visible_devices([], "GPU")
    return SummaryWriter(str(folder))


def drop_events(folder: Path, stands: Callable[[int, str], bool]) -> None:
    """Rewrites the event files of a folder, keeping the scalars whose (step, tag) `stands`; wall times stay as well."""
    files = sorted(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []
    if not files:
        return
    try:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        print(f"TensorBoard files may show repeated steps: {error}", file=sys.stderr)
        return
    for path in files:
        kept = []
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            tags = [value.tag for value in event.summary.value]  # CLU writes one scalar an event
            if all(stands(event.step, tag) for tag in tags):
                kept.append(record)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            writer = RecordWriter(file)
            for record in kept:
                writer.write(record)
        partial.replace(path)
