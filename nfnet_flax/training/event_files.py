"""TensorBoard's event files of a run. Only those that the run itself wrote are ever changed.

A run's own files carry a random name in their suffix, which is stored beside them: a file of another run, of
`nfnet_flax` or not, may be put into the folder to compare curves. Files of runs that began before there was such a
suffix are taken for those of others, too: nothing is lost, but they show the steps after a resume twice.
"""

import contextlib
import io
import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import write_whole
from nfnet_flax.messages import warn
from nfnet_flax.training import layout
from nfnet_flax.training.storage import storage_errors

_NAME_FILE = "run_name.txt"
"""In the folder of the event files: what the suffixes of the run's own files end in."""
_EVENTS = "events.out.tfevents"
_SUFFIX = ".nfnet_flax-"
_HEADER_BYTES = 12
"""In front of each record of an event file: its length, and a checksum of the length."""
_FRAME_BYTES = 16
"""The same, and the checksum behind each record."""

Stands = Callable[[int, str], bool]
"""Whether the value of a (step, tag) is to be kept."""
Key = tuple[int, str]
"""Step and tag of a value."""


class EventWriter:
    """Writes scalars to an event file of its own, by CLU.

    Raises (each method, too):
      StorageFailed: the file cannot be written.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        import tensorflow as tf
        from clu.metric_writers import SummaryWriter

        tf.config.set_visible_devices([], "GPU")

        class Writer(SummaryWriter):
            """CLU's, which gives its files no suffix of one's choice."""

            def __init__(self) -> None:
                super(SummaryWriter, self).__init__()
                self._summary_writer = tf.summary.create_file_writer(str(folder), filename_suffix=suffix)

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

    def flush(self) -> None:
        """Hands everything to the operating system."""
        with self._writing():
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        with self._writing():
            self._writer.close()


def open_events(workdir: Path) -> EventWriter | None:
    """A writer into a new event file of a run; None, with one warning, where TensorFlow is missing.

    Raises:
      ConfigError: `tensorboard` is no folder.
      StorageFailed: the folder or the file cannot be written.
    """
    folder = workdir / layout.TENSORBOARD
    _check_folder(folder)
    _silence_tensorflow()
    try:
        import clu.metric_writers  # noqa: F401
        import tensorflow  # noqa: F401
    except ImportError as error:  # before there is a folder: TensorBoard would show an empty run
        warn(f"only metrics.jsonl is written, no TensorBoard files ({error}): pip install tensorflow-cpu tensorboard")
        return None
    with storage_errors(folder, OSError):
        folder.mkdir(exist_ok=True)
        return EventWriter(folder, _SUFFIX + (_own_name(folder) or _new_name(folder)))


def tidy_events(workdir: Path, stands: Stands, rows: list[dict[str, Any]]) -> None:
    """Makes a run's own event files hold each (step, tag) that stands, once.

    What does not stand is dropped; wall times stay. A file that is damaged is kept in `damaged/`, and what is missing
    is written again. The files are left as they are where there is nothing to do.

    Args:
      workdir: folder of the run.
      stands: what is to be kept.
      rows: of `metrics.jsonl`; what they hold is missing if no event file has it. Empty: nothing is.

    Raises:
      ConfigError: `tensorboard` is no folder.
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
        # TensorBoard takes every file for one of its own that has this in its name.
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
        if path != target:  # after a kill before this, values stand twice until the next start
            path.unlink()


def _read(path: Path) -> tuple[list[tuple[Key | None, bytes]], bytes]:
    """The records in front of the first damage as they lie in the file, and the bytes behind them.

    Each record comes with the step and tag of its value; None: it has no value.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    content = path.read_bytes()
    records: list[tuple[Key | None, bytes]] = []
    start = 0
    for record in RawEventFileLoader(str(path)).Load():  # it ends at damage without a word, as at the end of the file
        end = start + len(record) + _FRAME_BYTES
        event = Event.FromString(record)
        tags = [value.tag for value in event.summary.value]  # CLU writes one scalar an event
        records.append(((event.step, tags[0]) if tags else None, content[start:end]))
        start = end
    return records, content[start:]


def _is_cut_short(rest: bytes) -> bool:
    """Whether the end of a file is nothing, or the beginning of a record whose end a kill cut off."""
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
    """What the suffixes of the run's own files end in; None where the run has written none yet."""
    path = folder / _NAME_FILE
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return text if re.fullmatch("[0-9a-f]{8}", text) else None


def _new_name(folder: Path) -> str:
    if any(folder.glob(f"{_EVENTS}*")):
        warn(f"{folder} holds event files that this run has not written; they are left as they are")
    name = secrets.token_hex(4)
    write_whole(folder / _NAME_FILE, f"{name}\n".encode())
    return name


def _check_folder(folder: Path) -> None:
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder, but TensorBoard's files are written there: move it away, or give --no-tensorboard"
        )


def _silence_tensorflow() -> None:
    # Before anything imports TensorFlow (TensorBoard's reader does): its notices would land in the progress line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
