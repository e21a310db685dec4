"""ILSVRC2012 as it is downloaded: the position of each image in the tar files, found without unpacking anything.

- The training tar holds one tar per class, `n01440764.tar`, of `n01440764_18.JPEG` ...
- The validation tar holds `ILSVRC2012_val_00000001.JPEG` ...; their classes are in the development kit.

None of the tars is compressed, so an image is a range of bytes of the outer file.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from nfnet_flax.config import ConfigError


class Member(NamedTuple):
    """A file within a tar."""

    name: str
    """Name of the file, without folder."""
    offset: int
    """Position of its first byte in the outermost file."""
    size: int
    """Size of the file, in bytes."""


def _members(file: IO[bytes], path: Path, start: int, stop: int) -> Iterator[Member]:
    """The regular files of the tar that fills the bytes `start` to `stop - 1` of `file`."""
    file.seek(start)
    try:
        # Names are only compared and printed, and nothing is unpacked, so a malicious name can do no harm.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if member.offset_data + member.size > stop:
                    raise ConfigError(f"{str(path)!r} is damaged or incomplete at {member.name!r}: download it again")
                if member.isreg() and not name.startswith("."):
                    yield Member(name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ConfigError(
            f"{str(path)!r} is not a complete, uncompressed tar file ({error}): download it again"
        ) from error


def tar_members(path: Path, start: int, stop: int | None) -> list[Member]:
    """The files in a tar file, or in a tar file that is contained in another one.

    Args:
      path: the outermost file.
      start: position of the tar's first byte.
      stop: position after the tar's last byte; None: the end of the file.

    Raises:
      ConfigError: it is missing, empty, compressed, or cut off.
    """
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size if stop is None else stop
            members = list(_members(file, path, start, end))
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error.strerror}): give the path of the tar file") from error
    if not members:
        raise ConfigError(f"{str(path)!r} has no files in it: download it again")
    return members


def class_tars(path: Path) -> dict[str, Member]:
    """The tar of each class within the training tar, in the order of the labels: the sorted WordNet ids.

    Raises:
      ConfigError: as for `tar_members`; or the file does not consist of tars of at least two classes.
    """
    members = tar_members(path, 0, None)
    if other := [member.name for member in members if not member.name.endswith(".tar")]:
        raise ConfigError(
            f"{str(path)!r} holds {other[0]!r}: expected is ILSVRC2012_img_train.tar, which holds one tar per class"
        )
    found = {member.name.removesuffix(".tar"): member for member in members}
    if len(found) < 2 or len(found) != len(members):
        raise ConfigError(f"{str(path)!r} holds {len(members)} tars of {len(found)} classes: download it again")
    return dict(sorted(found.items()))


def devkit_classes(path: Path) -> list[str]:
    """Class of each validation image, in the order of their names, from the development kit.

    Args:
      path: ILSVRC2012_devkit_t12.tar.gz. Line N of its ground truth file is the number of the class of the N-th image.

    Raises:
      ConfigError: the file is not the development kit.
    """
    from scipy.io import loadmat  # type: ignore[import-untyped]  # slow, and the workers do without it

    try:
        with tarfile.open(path, "r:*") as tar:
            meta = loadmat(io.BytesIO(_contents(tar, "meta.mat")), squeeze_me=True)["synsets"]
            truth = _contents(tar, "ILSVRC2012_validation_ground_truth.txt").split()
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(meta)}
        return [ids[int(number)] for number in truth]
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} is not the development kit with meta.mat and ILSVRC2012_validation_ground_truth.txt "
            f"({type(error).__name__}: {error}): give ILSVRC2012_devkit_t12.tar.gz"
        ) from error


def _contents(tar: tarfile.TarFile, name: str) -> bytes:
    for member in tar.getmembers():
        file = tar.extractfile(member) if PurePosixPath(member.name).name == name else None
        if file is not None:
            return file.read()
    raise KeyError(f"no {name} in it")


def listed_classes(path: Path, file_names: list[str]) -> list[str]:
    """Class of each validation image, in the order of their names, from a text file.

    Args:
      path: text file. Each line is `ILSVRC2012_val_00000001.JPEG n01751748`; or each line is only a class, in the order
        of the images' names.
      file_names: sorted names of the validation images.

    Raises:
      ConfigError: there is no such file, its lines have neither form, or an image has no line.
    """
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error}): give a text file") from error
    widths = {len(row) for row in rows}
    if widths == {1}:
        return [row[0] for row in rows]
    if widths != {2}:
        raise ConfigError(f"{str(path)!r}: each line must be 'FILE WORDNET_ID', or each 'WORDNET_ID'")
    classes = {row[0]: row[1] for row in rows}
    if missing := [name for name in file_names if name not in classes]:
        raise ConfigError(f"{str(path)!r} has no line for {len(missing)} images, such as {missing[0]}")
    return [classes[name] for name in file_names]
