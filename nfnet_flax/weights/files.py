"""Reads and writes safetensors files, as a whole or not at all, and recognizes files of other kinds.

safetensors is imported where a file is read or written: networks can be made and used without it.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.progress import track, tracking
from nfnet_flax.weights.entries import HostArrays

if TYPE_CHECKING:
    from safetensors import safe_open

_LENGTH_BYTES = 8
"""Size of the number with which a safetensors file begins: the length of its header, a little-endian integer."""
_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the library accepts."""
_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights themselves: run `git lfs pull` where it lies",
    b"PK\x03\x04": "is a zip archive, as PyTorch (.pth) and NumPy (.npz) write them: save its arrays by safetensors",
    **dict.fromkeys(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),  # with the protocols that Python writes
        "is a pickle: published ones are converted by `nfnet convert haiku`, others saved anew by safetensors",
    ),
    b"<": "is a web page or XML, so the download failed: download it again",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"\x89HDF": "is an HDF5 file: save its arrays by safetensors",
}
"""First bytes of files that are given by mistake -> what they are, and what to do."""


def recognize(path: Path) -> str | None:
    """What a file is if it contains no weights: a Git LFS pointer, a web page, ...; None if its first bytes do not show
    it.

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        return "is empty: download or copy it again"
    if start[_LENGTH_BYTES:].startswith(b"{") and int.from_bytes(start[:_LENGTH_BYTES], "little") <= _MAX_HEADER_BYTES:
        return None  # a safetensors file, whose length can begin with the bytes of any other kind
    return next((kind for magic, kind in _KINDS.items() if start.lstrip().startswith(magic)), None)


def read_safetensors(path: Path) -> tuple[HostArrays, dict[str, str]]:
    """Tensors and metadata of any `.safetensors` file.

    Raises:
      ConfigError: the file cannot be read, is incomplete or damaged, or is something else; the message says what.
    """
    from safetensors import SafetensorError, safe_open

    named = f"weights file {str(path)!r}"
    if path.is_dir():
        raise ConfigError(f"{named} is a folder: give the file in it (a run's folder: `nfnet convert run` makes one)")
    try:
        with safe_open(path, framework="numpy") as file:
            names = track(list(file.keys()), f"reading {path}", "arrays")
            return {name: _tensor(file, name) for name in names}, dict(file.metadata() or {})
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error}") from error
    except SafetensorError as error:
        raise ConfigError(f"{named} {recognize(path) or _defect(path) or f'is damaged: {error}'}") from error


def _tensor(file: "safe_open", name: str) -> np.ndarray:
    from safetensors import SafetensorError

    try:
        tensor: np.ndarray = file.get_tensor(name)
    except (AttributeError, TypeError) as error:  # such as float8
        kind = file.get_slice(name).get_dtype()
        raise SafetensorError(f"{name} is of type {kind}, which is not read here: save it as float32") from error
    return tensor


def _defect(path: Path) -> str | None:
    """The problem if the lengths in a safetensors file do not fit its size; None if they do or cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            return "is no .safetensors file"
        header = file.read(length)
    if size < _LENGTH_BYTES + length:
        return f"is incomplete (its {size} bytes end within the header): download or copy it again"
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = _LENGTH_BYTES + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    if size < expected:
        return f"is incomplete ({size} of {expected} bytes): download or copy it again"
    return None


def check_target(path: Path, *, overwrite: bool) -> None:
    """Checks, before any work is done, that a file may be written at a path.

    Raises:
      ConfigError: a file or folder already exists there, and must not be replaced.
    """
    if path.is_dir():
        raise ConfigError(f"weights file {str(path)!r} is a folder: give another place")
    if not overwrite and path.exists():
        raise ConfigError(
            f"weights file {str(path)!r} exists already: give another place, or replace it "
            "(--overwrite, in Python overwrite=True)"
        )


def write_safetensors(path: Path, arrays: HostArrays, metadata: dict[str, str], *, overwrite: bool) -> None:
    """Writes a file that gets its name only when it is complete; missing folders are made.

    Raises:
      ConfigError: it cannot be written, or exists and must not be replaced.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    check_target(path, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # follows the user's umask; safetensors makes files that only the owner can read
        # safetensors writes the memory as it is: a transposed view would be stored wrongly, without an error.
        with tracking(f"writing {path}"):
            save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, partial, metadata)
            partial.chmod(mode)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        check_target(path, overwrite=overwrite)  # again, as another process may have written the file meanwhile
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights file {str(path)!r} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            partial.unlink()
