"""The layout of a run's folder. All code that writes, reads or inspects a run takes the names from here.

    recipe.json        the resolved recipe
    input.json         facts on which the contents of the batches depend
    classes.json       class names in the order of the labels
    initial.json       the weights that `init_from` named
    environment.json   versions, device and settings on which the last bits depend
    code/              copies of the user's own code that defines parts of the recipe, if there is any
    owner/             which process writes here
    checkpoints/STEP   the newest checkpoints
    best/STEP          the best checkpoint
    damaged/           checkpoints and files that were found damaged
    metrics.jsonl      one JSON object for each step that has metrics
    agc.jsonl          what adaptive gradient clipping does in each layer
    events.jsonl       when the run started, worked, waited and ended
    trackers.json      which metrics other trackers have (`telemetry/tracking.py`)
    trackers/          files of these
    tensorboard/       the same numbers for TensorBoard, with images, tables and settings
    tensorboard/plugins/profile/TIME_steps_A_to_B/   a profile: the trace and the memory of each process
    profile_now        asks for a profile, and is deleted then
    log/               what each start printed, and tracebacks of errors: a file for each process

A checkpoint is a folder with two parts. `notes/notes.json` lists every array with its type, shape and checksum, and
contains a checksum of itself; anything that it does not list is not part of the checkpoint. `state` contains the arrays
as Orbax writes them: Zarr arrays in an OCDBT database. The number and the names of the files of this database depend on
the library and on the number of processes; so an array exists if TensorStore can read it.
"""

import contextlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from nfnet_flax.config import ConfigError
from nfnet_flax.paths import is_missing
from nfnet_flax.training.fingerprints import Fingerprints, host_fingerprint
from nfnet_flax.training.storage import StorageFailed, brief, storage_errors

RECIPE = "recipe.json"
INPUT = "input.json"
CLASSES = "classes.json"
INITIAL = "initial.json"
ENVIRONMENT = "environment.json"
CODE = "code"
OWNER = "owner"
CHECKPOINTS = "checkpoints"
BEST = "best"
CHECKPOINT_KINDS = (CHECKPOINTS, BEST)
SET_ASIDE = "damaged"
METRICS = "metrics.jsonl"
AGC = "agc.jsonl"
EVENTS = "events.jsonl"
TRACKERS = "trackers.json"
TRACKER_FILES = "trackers"
TENSORBOARD = "tensorboard"
PROFILES = "plugins/profile"
"""Folder of the profiles, in that of TensorBoard's files, where its plugin looks for them."""
LOG = "log"

STATE = "state"
"""Part of a checkpoint: folder of the arrays."""
NOTES = "notes"
"""Part of a checkpoint: folder of the notes, which are one file."""
NOTES_FILE = "notes.json"

COMMIT = "commit.json"
"""In a bucket, the last object of a checkpoint (`mirror.py`)."""

Notes = dict[str, Any]
"""Facts about a checkpoint besides its state, as JSON."""

_CACHE_BYTES = 100_000_000
"""Size of the cache for the index of the arrays, which would otherwise be read again for each array."""
_DAMAGE = re.compile("(?:NOT_FOUND|DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION): |(?![A-Z_]+: )")
"""Beginning of TensorStore's errors if a file is missing, too short, or does not have the right checksum or format. An
error without a code means an invalid argument; here, this is content that cannot be decoded."""


class Damaged(Exception):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """A checkpoint differs from what was saved: a part is missing or too short, or a checksum differs."""


def check_run(field: str, value: str | os.PathLike[str], workdir: Path) -> None:
    """Checks that a folder which is to be read holds a run.

    Args:
      field: name of the value in the message, such as `workdir`.
      value: the folder as the user gave it.
      workdir: its path.

    Raises:
      ConfigError: it does not exist, is a file, or holds no recipe.
    """
    if not is_missing(workdir / RECIPE):
        return
    named, remedy = f"{field} = {os.fspath(value)!r}", "give the folder of a run, which nfnet train --workdir DIR made"
    if is_missing(workdir):
        raise ConfigError(f"{named}: there is no such folder: {remedy}")
    if not workdir.is_dir():
        raise ConfigError(f"{named}: is a file: {remedy}")
    found = [name for name in (*CHECKPOINT_KINDS, METRICS) if not is_missing(workdir / name)]
    if found:
        raise ConfigError(
            f"{named}: the folder holds {found[0]}, but no {RECIPE}: put it back, or start nfnet train with the run's "
            "own recipe again, which writes it"
        )
    raise ConfigError(f"{named}: the folder holds no run (no {RECIPE}): {remedy}")


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, damaged or not, newest first; only names are read.

    Raises:
      StorageFailed: the folder exists and cannot be listed, which is not the same as a run without checkpoints.
    """
    with storage_errors(folder, OSError):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            if folder.exists():  # a file with the name of the folder
                raise
            return []
    return sorted((int(name) for name in names if re.fullmatch("[0-9]+", name)), reverse=True)


def free_place(workdir: Path, name: str) -> Path:
    """An unused path in `damaged/` to which a damaged file or folder can be moved. Makes the folder `damaged/`.

    Raises:
      OSError: the folder cannot be made.
    """
    folder = workdir / SET_ASIDE
    folder.mkdir(exist_ok=True)
    names = (name if number == 0 else f"{name}-{number}" for number in itertools.count())
    return next(folder / name for name in names if not os.path.lexists(folder / name))


def seal(notes: Notes, arrays: Fingerprints) -> dict[str, Any]:
    """The contents of a checkpoint's `notes.json`: the notes, the checksum of every array, and a checksum of both."""
    return {"notes": notes, "arrays": arrays, "checksum": _checksum(notes, arrays)}


def _checksum(notes: Notes, arrays: Fingerprints) -> int:
    return zlib.crc32(json.dumps([notes, arrays], sort_keys=True).encode())


def read_sealed(checkpoint: Path) -> tuple[Notes, Fingerprints]:
    """Notes and checksums of a checkpoint.

    Raises:
      Damaged: they are missing, or differ from what was stored.
      StorageFailed: the file cannot be opened or read; it need not be damaged.
    """
    path = checkpoint / NOTES / NOTES_FILE
    try:
        if checkpoint.is_dir() and not any(checkpoint.iterdir()):
            raise Damaged("an empty folder")
        stored = json.loads(path.read_bytes().decode())
        notes, arrays, checksum = (stored[name] for name in ("notes", "arrays", "checksum"))
    except FileNotFoundError as error:
        raise Damaged(f"{NOTES}/{NOTES_FILE} is missing") from error
    except NotADirectoryError as error:
        raise Damaged("a file in the place of a folder") from error
    except IsADirectoryError as error:
        raise Damaged(f"{NOTES}/{NOTES_FILE} is a folder") from error
    except OSError as error:
        raise StorageFailed(f"{path}: {brief(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{NOTES}/{NOTES_FILE}: {brief(error)}") from error
    if checksum != _checksum(notes, arrays):
        raise Damaged(f"{NOTES}/{NOTES_FILE} is not what was saved")
    return notes, arrays


def array_context() -> ts.Context:
    """A context that the arrays of a checkpoint share, so that their index is read once."""
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


def open_array(checkpoint: Path, name: str, context: ts.Context) -> ts.TensorStore:
    """Opens an array of a checkpoint, by its name in the notes; its data are read by slicing.

    Raises:
      StorageFailed: TensorStore cannot read from such a path.
      ValueError: raised by TensorStore; `reading` converts it.
    """
    base = {"driver": "file", "path": f"{(checkpoint / STATE).absolute()}/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    try:
        checked = ts.Spec(spec)
    except ValueError as error:  # such as a path that TensorStore does not support: this is not damage
        raise StorageFailed(f"{checkpoint}: {brief(error)}") from error
    return ts.open(checked, read=True, open=True, context=context).result()


@contextlib.contextmanager
def reading(checkpoint: Path, name: str) -> Iterator[None]:
    """Converts the errors that TensorStore raises while it opens or reads an array.

    Raises:
      Damaged: a file is missing or too short, or does not have the right checksum or format.
      StorageFailed: a system call failed; the array need not be damaged.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        # An error number means that a system call failed. Only errors without one are about the content.
        is_damage = bool(_DAMAGE.match(text)) and "os_error_code" not in text and checkpoint.is_dir()
        if is_damage:
            raise Damaged(f"{name}: {brief(error)}") from error
        raise StorageFailed(f"{checkpoint}: {name}: {brief(error)}") from error


def read_array(checkpoint: Path, name: str, saved: str, context: ts.Context) -> np.ndarray:
    """A whole array of a checkpoint in the host's memory, compared with its checksum.

    Args:
      checkpoint: folder of the checkpoint.
      name: name of the array.
      saved: type, shape and checksum of the array in the notes.
      context: result of `array_context`.

    Raises:
      Damaged: the array is missing or differs from what was saved.
      StorageFailed: it cannot be read; it need not be damaged.
    """
    with reading(checkpoint, name):
        stored = open_array(checkpoint, name, context)
        check_type(name, stored, saved)  # before memory is allocated
        array = np.asarray(stored.read().result())
    if (found := host_fingerprint(array)) != saved:
        raise Damaged(f"{name} is {found} instead of {saved}")
    return array


def check_type(name: str, stored: ts.TensorStore, saved: str) -> None:
    """Checks type and shape of an opened array.

    Raises:
      Damaged: they are not those in `saved`.
    """
    found = f"{stored.dtype.numpy_dtype.name}[{','.join(map(str, stored.shape))}]"
    if found != saved.split()[0]:
        raise Damaged(f"{name} is {found} instead of {saved}")
