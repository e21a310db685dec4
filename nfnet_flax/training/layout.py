"""What the folder of a run holds. Whoever writes, reads or inspects a run takes the names from here.

    recipe.json        the resolved recipe
    input.json         what the input is made of
    classes.json       class names in the order of the labels
    initial.json       which weights `init_from` gave
    environment.json   versions, device and settings that decide the last bits
    code/              copies of the user's own code that defines parts of the recipe, if any does
    owner/             which process writes here
    checkpoints/STEP   the newest checkpoints
    best/STEP          the best one
    damaged/           checkpoints and files that were found damaged
    metrics.jsonl      one JSON object for each step that has metrics
    tensorboard/       the same numbers as TensorBoard scalars

A checkpoint is a folder with two parts. `notes/notes.json` names every array with its type, shape and checksum, and
carries a checksum of its own: what it does not name does not belong to the checkpoint. `state` holds the arrays as
Orbax writes them: Zarr arrays in an OCDBT database. How many files this database has, and how they are called, is up to
the library and depends on the number of processes; so an array is there if TensorStore can read it.
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
TENSORBOARD = "tensorboard"

STATE = "state"
"""Part of a checkpoint: the arrays."""
NOTES = "notes"
"""Part of a checkpoint: a folder with one file."""
NOTES_FILE = "notes.json"

Notes = dict[str, Any]
"""What is known of a checkpoint besides its state: JSON."""

_CACHE_BYTES = 100_000_000
"""For the index of the arrays, which would be read anew for each."""
_DAMAGE = re.compile("(?:NOT_FOUND|DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION): |(?![A-Z_]+: )")
"""How TensorStore's errors begin where a file is missing, too short, or not what its checksum or format says. With no
code in front are those of an invalid argument: here, of content that cannot be decoded."""


class Damaged(Exception):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """A checkpoint is known not to be what was saved: a part is missing or too short, or a checksum differs."""


def steps_in(folder: Path) -> list[int]:
    """Steps for which a folder holds something under a checkpoint's name, good or not; newest first.

    Raises:
      StorageFailed: the folder is there and cannot be listed, which is not the same as a run without checkpoints.
    """
    with storage_errors(folder, OSError):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            if folder.exists():  # a file in its place
                raise
            return []
    return sorted((int(name) for name in names if re.fullmatch("[0-9]+", name)), reverse=True)


def free_place(workdir: Path, name: str) -> Path:
    """Where something that is damaged can be kept: a path in `damaged/` that nothing has yet. Makes that folder.

    Raises:
      OSError: the folder cannot be made.
    """
    folder = workdir / SET_ASIDE
    folder.mkdir(exist_ok=True)
    names = (name if number == 0 else f"{name}-{number}" for number in itertools.count())
    return next(folder / name for name in names if not os.path.lexists(folder / name))


def seal(notes: Notes, arrays: Fingerprints) -> dict[str, Any]:
    """What is stored as a checkpoint's `notes`: those of the run, the checksum of every array, and their own."""
    return {"notes": notes, "arrays": arrays, "checksum": _checksum(notes, arrays)}


def _checksum(notes: Notes, arrays: Fingerprints) -> int:
    return zlib.crc32(json.dumps([notes, arrays], sort_keys=True).encode())


def read_sealed(checkpoint: Path) -> tuple[Notes, Fingerprints]:
    """Notes and checksums of a checkpoint.

    Raises:
      Damaged: they are missing, or not what was stored.
      StorageFailed: the file cannot be opened or read, which says nothing of what it holds.
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
    """To be shared by the arrays of a checkpoint, so that their index is read once."""
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


def open_array(checkpoint: Path, name: str, context: ts.Context) -> ts.TensorStore:
    """An array of a checkpoint, by its name in the notes; its data are read by slicing.

    Raises:
      StorageFailed: TensorStore cannot read at such a place.
      ValueError: of TensorStore; `reading` says what it means.
    """
    base = {"driver": "file", "path": f"{(checkpoint / STATE).absolute()}/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    try:
        checked = ts.Spec(spec)
    except ValueError as error:  # such as a path that TensorStore does not take: no word about what is stored
        raise StorageFailed(f"{checkpoint}: {brief(error)}") from error
    return ts.open(checked, read=True, open=True, context=context).result()


@contextlib.contextmanager
def reading(checkpoint: Path, name: str) -> Iterator[None]:
    """Says what the errors of TensorStore mean, while it opens or reads an array.

    Raises:
      Damaged: a file is missing or too short, or is not what its checksum or format says.
      StorageFailed: the system could not do what it was asked to, which says nothing of what was saved.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        # With an error number, the system could not do what it was asked to; only without one it is about the content.
        is_damage = bool(_DAMAGE.match(text)) and "os_error_code" not in text and checkpoint.is_dir()
        if is_damage:
            raise Damaged(f"{name}: {brief(error)}") from error
        raise StorageFailed(f"{checkpoint}: {name}: {brief(error)}") from error


def read_array(checkpoint: Path, name: str, saved: str, context: ts.Context) -> np.ndarray:
    """A whole array of a checkpoint in the host's memory, compared with its checksum.

    Args:
      checkpoint: its folder.
      name: of the array.
      saved: type, shape and checksum, as the notes have them.
      context: of `array_context`.

    Raises:
      Damaged: the array is missing or not what was saved.
      StorageFailed: it cannot be read, which says nothing of what it holds.
    """
    with reading(checkpoint, name):
        stored = open_array(checkpoint, name, context)
        check_type(name, stored, saved)  # before memory is asked for
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
