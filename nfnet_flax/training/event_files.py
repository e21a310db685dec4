"""TensorBoard's event files of a run after a resume: each value is there once.

Only files that the run itself wrote are changed. Their names end with a random text, which is stored in the same
folder. So files of other runs, of `nfnet_flax` or not, may be put into the folder to compare curves. Files of runs that
began before this suffix existed are treated like files of others: nothing is lost, but they show the steps after a
resume twice.
"""

import io
import os
import re
import secrets
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import write_whole
from nfnet_flax.messages import warn
from nfnet_flax.telemetry.overview import RUNS, metric_of, places_of
from nfnet_flax.training import layout
from nfnet_flax.training.storage import storage_errors

_NAME_FILE = "run_name.txt"
"""File in the folder of the event files with the text in which the suffixes of the run's own files end."""
_EVENTS = "events.out.tfevents"
_SUFFIX = ".nfnet_flax-"
_ABOUT = ".about"
"""End of the name of the file that is replaced at each start."""
_HEADER_BYTES = 12
"""Size of the header of each record in an event file: the record's length, and a checksum of the length."""
_FRAME_BYTES = 16
"""Size of this header and of the checksum after each record."""

Stands = Callable[[int, str], bool]
"""Function of a step and a tag: whether their value is kept."""
Key = tuple[int, str]
"""Step and tag of a value."""


def suffix(name: str, *, is_about: bool = False) -> str:
    """End of the names of a run's own event files, or of the one that is replaced at each start.

    Args:
      name: result of `own_name`.
      is_about: which of the two.
    """
    return f"{_SUFFIX}{name}{_ABOUT if is_about else ''}"


def about_files(folder: Path, name: str) -> list[Path]:
    """The run's own files that are replaced at each start."""
    return sorted(folder.glob(f"{_EVENTS}*{suffix(name, is_about=True)}"))


def wait_to_be_last(folder: Path, name: str) -> None:
    """Waits, for a second at most, until a new file's name is the last of those of a run.

    TensorBoard follows a run in the order of the names, and never returns to an earlier file. A name begins with the
    second in which the file is made, and what follows is not in order within a process: its tenth file, `.10`, comes
    before the ninth, `.9`. So a run that continues in the same process makes its file in a later second.
    """
    now_s = time.time()
    if any(folder.glob(f"{_EVENTS}.{int(now_s):010d}.*{suffix(name)}")):
        time.sleep(int(now_s) + 1 - now_s)


def tidy_events(workdir: Path, stands: Stands, rows: list[dict[str, Any]]) -> None:
    """Rewrites a run's own event files so that they contain each valid (step, tag) once.

    Other values are dropped; wall times are kept. A damaged file is kept in `damaged/`, and missing values are written
    again. If there is nothing to do, the files are not changed.

    Args:
      workdir: folder of the run.
      stands: function that says which values are valid, by the names of the metrics.
      rows: rows of `metrics.jsonl`; values in them that no event file contains are missing. Empty: no value is missing.

    Raises:
      ConfigError: `tensorboard` is not a folder.
      StorageFailed: a file cannot be read or written.
    """
    folder = workdir / layout.TENSORBOARD
    check_folders(folder)
    silence_tensorflow()
    try:
        with storage_errors(folder, OSError):
            name = own_name(folder)
            if name is None:
                return
            files = {run: sorted((folder / run).glob(f"{_EVENTS}*{suffix(name)}")) for run in RUNS}
            if any(files.values()):
                num_missing = sum(_tidy(workdir, run, suffix(name), files[run], stands, rows) for run in RUNS)
                if num_missing:
                    warn(
                        f"{num_missing} values that TensorBoard's files do not hold are written again from "
                        f"{layout.METRICS}"
                    )
    except ImportError as error:
        warn(f"TensorBoard files may show repeated steps: {error}")


def _tidy(workdir: Path, run: str, name_end: str, files: list[Path], stands: Stands, rows: list[dict[str, Any]]) -> int:
    """Rewrites the files of one of the `RUNS` of the overview; returns the number of values that were missing."""
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
            step, tag = key
            if stands(step, metric_of(run, tag)):
                kept[key] = record
        if not _is_cut_short(rest):
            damaged.append(path)
    missing = {key: value for key, value in _values_of(run, rows).items() if key not in kept and value is not None}
    if not damaged and not missing and num_values == len(kept):
        return 0
    for path in damaged:
        # TensorBoard reads every file that has this text in its name.
        aside = layout.free_place(workdir, path.name.replace("tfevents", "damaged"))
        write_whole(aside, path.read_bytes())
        warn(f"{path} is damaged; it is kept as {aside}")
    kept |= {key: _scalar(key, value) for key, value in missing.items()}
    ordered = [kept[key] for key in sorted(kept, key=lambda key: key[0])]
    folder = workdir / layout.TENSORBOARD / run
    folder.mkdir(exist_ok=True)
    target = folder / f"{_EVENTS}.0000000000.repaired{name_end}"  # sorts first, so that steps are in order
    write_whole(target, (header or _header()) + b"".join(ordered))
    for path in files:
        if path != target:  # if the process is killed before this, values are there twice until the next start
            path.unlink()
    return len(missing)


def _values_of(run: str, rows: list[dict[str, Any]]) -> dict[Key, float | None]:
    """The values of rows of `metrics.jsonl` that belong into the files of a run of the overview."""
    return {
        (row["step"], tag): value
        for row in rows
        for name, value in row.items()
        if name != "step"
        for its_run, tag in places_of(name)
        if its_run == run
    }


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


def own_name(folder: Path) -> str | None:
    """The text in which the suffixes of the run's own files end; None if the run has not written any yet."""
    path = folder / _NAME_FILE
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return text if re.fullmatch("[0-9a-f]{8}", text) else None


def new_name(folder: Path) -> str:
    """Chooses and stores this text for a new run; warns if there are event files already."""
    if any(folder.glob(f"{_EVENTS}*")):
        warn(f"{folder} holds event files that this run has not written; they are not changed")
    name = secrets.token_hex(4)
    write_whole(folder / _NAME_FILE, f"{name}\n".encode())
    return name


def check_folders(folder: Path) -> None:
    """Raises `ConfigError` if the folder of the event files, or one within it, is something else."""
    for path in (folder / run for run in RUNS):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise ConfigError(
                f"{path} is not a folder, but TensorBoard's files go there: move it away, or give --no-tensorboard"
            )


def silence_tensorflow() -> None:
    """Turns off messages of TensorFlow, which would break the progress line. To be called before anything imports it,
    as TensorBoard's reader does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
