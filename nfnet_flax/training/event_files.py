"""TensorBoard's event files of a run. Only files that the run itself wrote are changed.

The names of a run's own files end with a random text, which is stored in the same folder. So files of other runs, of
`nfnet_flax` or not, may be put into the folder to compare curves. Files of runs that began before this suffix existed
are treated like files of others: nothing is lost, but they show the steps after a resume twice.
"""

import contextlib
import io
import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import write_whole
from nfnet_flax.messages import warn
from nfnet_flax.training import layout
from nfnet_flax.training.storage import storage_errors

_NAME_FILE = "run_name.txt"
"""File in the folder of the event files with the text in which the suffixes of the run's own files end."""
_EVENTS = "events.out.tfevents"
_SUFFIX = ".nfnet_flax-"
_HEADER_BYTES = 12
"""Size of the header of each record in an event file: the record's length, and a checksum of the length."""
_FRAME_BYTES = 16
"""Size of this header and of the checksum after each record."""

Stands = Callable[[int, str], bool]
"""Function of a step and a tag: whether their value is kept."""
Key = tuple[int, str]
"""Step and tag of a value."""


Images = Mapping[str, np.ndarray]
"""Tag -> (H, W, 3) uint8."""
Texts = Mapping[str, str]
"""Tag -> text in Markdown."""
Histograms = Mapping[str, np.ndarray]
"""Tag -> values, of which the histogram is shown: (N,), of any type of real numbers."""


class EventWriter:
    """Writes to a new event file, by CLU.

    Raises (also by each method):
      StorageFailed: the file cannot be written.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        import tensorflow as tf
        from clu.metric_writers import SummaryWriter

        tf.config.set_visible_devices([], "GPU")

        class Writer(SummaryWriter):
            """CLU's writer, for whose files the suffix cannot be chosen otherwise."""

            def __init__(self) -> None:
                super(SummaryWriter, self).__init__()
                self._summary_writer = tf.summary.create_file_writer(str(folder), filename_suffix=suffix)

            def write_summary(self, step: int, summary: Any) -> None:
                """Adds a summary that TensorBoard's own functions made, with one or more values."""
                with self._summary_writer.as_default():
                    tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=step)

        self._folder = folder
        self._error: type[Exception] = tf.errors.OpError
        with self._writing():
            self._writer = Writer()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with storage_errors(self._folder, OSError), storage_errors(self._folder, self._error):
            yield

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds values of a step."""
        with self._writing():
            self._writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Images) -> None:
        """Adds images of a step."""
        with self._writing():
            self._writer.write_images(step, images)

    def write_texts(self, step: int, texts: Texts) -> None:
        """Adds texts of a step."""
        with self._writing():
            self._writer.write_texts(step, texts)

    def write_histograms(self, step: int, histograms: Histograms) -> None:
        """Adds histograms of a step. Values that are not finite are left out, and what has no other ones, too."""
        # CLU lets TensorFlow compute each of them, which takes nine times as long as TensorBoard's function with NumPy.
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        summary = Summary()
        for tag, values in histograms.items():
            finite = np.asarray(values, np.float32)[np.isfinite(values)]
            if finite.size:
                summary.value.extend(histogram_pb(tag, finite).value)
        with self._writing():
            self._writer.write_summary(step, summary)

    def flush(self) -> None:
        """Hands everything to the operating system."""
        with self._writing():
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        with self._writing():
            self._writer.close()


def open_events(workdir: Path) -> EventWriter | None:
    """A writer for a new event file of a run; None, with one warning, if TensorFlow is missing.

    Raises:
      ConfigError: `tensorboard` is not a folder.
      StorageFailed: the folder or the file cannot be written.
    """
    folder = workdir / layout.TENSORBOARD
    _check_folder(folder)
    _silence_tensorflow()
    try:
        import clu.metric_writers  # noqa: F401
        import tensorflow  # noqa: F401
    except ImportError as error:  # before the folder is made, as TensorBoard would show an empty run
        warn(f"only metrics.jsonl is written, no TensorBoard files ({error}): pip install tensorflow-cpu tensorboard")
        return None
    with storage_errors(folder, OSError):
        folder.mkdir(exist_ok=True)
        return EventWriter(folder, _SUFFIX + (_own_name(folder) or _new_name(folder)))


def tidy_events(workdir: Path, stands: Stands, rows: list[dict[str, Any]]) -> None:
    """Rewrites a run's own event files so that they contain each valid (step, tag) once.

    Other values are dropped; wall times are kept. A damaged file is kept in `damaged/`, and missing values are written
    again. If there is nothing to do, the files are not changed.

    Args:
      workdir: folder of the run.
      stands: function that says which values are valid.
      rows: rows of `metrics.jsonl`; values in them that no event file contains are missing. Empty: no value is missing.

    Raises:
      ConfigError: `tensorboard` is not a folder.
      StorageFailed: a file cannot be read or written.
    """
    folder = workdir / layout.TENSORBOARD
    _check_folder(folder)
    _silence_tensorflow()
    try:
        with storage_errors(folder, OSError):
            name = _own_name(folder)
            files = [] if name is None else sorted(folder.glob(f"{_EVENTS}*{_SUFFIX}{name}"))
            if files:
                _tidy(workdir, files, stands, rows)
    except ImportError as error:
        warn(f"TensorBoard files may show repeated steps: {error}")


def _tidy(workdir: Path, files: list[Path], stands: Stands, rows: list[dict[str, Any]]) -> None:
    header = b""
    kept: dict[Key, bytes] = {}
    num_values = 0
    damaged: list[Path] = []
    for path in files:
        records, rest = _read(path)
        for key, record in records:
            if key is None:
                header = header or record
                continue
            num_values += 1
            if stands(*key):
                kept[key] = record
        if not _is_cut_short(rest):
            damaged.append(path)
    wanted = {(row["step"], name): value for row in rows for name, value in row.items() if name != "step"}
    missing = {key: value for key, value in wanted.items() if key not in kept and value is not None}
    if not damaged and not missing and num_values == len(kept):
        return
    for path in damaged:
        # TensorBoard reads every file that has this text in its name.
        aside = layout.free_place(workdir, path.name.replace("tfevents", "damaged"))
        write_whole(aside, path.read_bytes())
        warn(f"{path} is damaged; it is kept as {aside}")
    if missing:
        warn(f"{len(missing)} values that TensorBoard's files do not hold are written again from {layout.METRICS}")
    kept |= {key: _scalar(key, value) for key, value in missing.items()}
    ordered = [kept[key] for key in sorted(kept, key=lambda key: key[0])]
    suffix = files[0].name[files[0].name.index(_SUFFIX) :]
    target = files[0].with_name(f"{_EVENTS}.0000000000.repaired{suffix}")  # sorts first, so that steps are in order
    write_whole(target, (header or _header()) + b"".join(ordered))
    for path in files:
        if path != target:  # if the process is killed before this, values are there twice until the next start
            path.unlink()


def _read(path: Path) -> tuple[list[tuple[Key | None, bytes]], bytes]:
    """The records before the first damage, as bytes, and the bytes after them.

    Each record comes with the step and tag of its value, or None if it has no value. A record with several values is
    returned as several records with one value each.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    content = path.read_bytes()
    records: list[tuple[Key | None, bytes]] = []
    start = 0
    for record in RawEventFileLoader(str(path)).Load():  # ends at damage as at the end of the file, without an error
        end = start + len(record) + _FRAME_BYTES
        event = Event.FromString(record)
        values = event.summary.value
        if len(values) > 1:  # histograms
            for value in values:
                alone = Event(wall_time=event.wall_time, step=event.step, summary={"value": [value]})
                records.append(((event.step, value.tag), _framed(alone)))
        else:
            records.append(((event.step, values[0].tag) if values else None, content[start:end]))
        start = end
    return records, content[start:]


def _is_cut_short(rest: bytes) -> bool:
    """Whether the rest of a file is empty, or the beginning of a record that was cut short when the process was
    killed."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    if len(rest) < _HEADER_BYTES:
        return True
    length, checksum = struct.unpack("<QI", rest[:_HEADER_BYTES])
    return checksum == masked_crc32c(rest[:8]) and len(rest) < length + _FRAME_BYTES


def _framed(event: Any) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


def _scalar(key: Key, value: float) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    step, tag = key
    return _framed(Event(wall_time=time.time(), step=step, summary=scalar_pb(tag, value)))


def _header() -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    return _framed(Event(wall_time=time.time(), file_version="brain.Event:2"))


def _own_name(folder: Path) -> str | None:
    """The text in which the suffixes of the run's own files end; None if the run has not written any yet."""
    path = folder / _NAME_FILE
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return text if re.fullmatch("[0-9a-f]{8}", text) else None


def _new_name(folder: Path) -> str:
    if any(folder.glob(f"{_EVENTS}*")):
        warn(f"{folder} holds event files that this run has not written; they are not changed")
    name = secrets.token_hex(4)
    write_whole(folder / _NAME_FILE, f"{name}\n".encode())
    return name


def _check_folder(folder: Path) -> None:
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder, but TensorBoard's files go there: move it away, or give --no-tensorboard"
        )


def _silence_tensorflow() -> None:
    # Before anything imports TensorFlow (TensorBoard's reader does), whose messages would break the progress line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
