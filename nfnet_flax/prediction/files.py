"""The image files that a user names by files, folders and patterns."""

import contextlib
import errno
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.decode import IMAGE_SUFFIXES, is_image_name
from nfnet_flax.paths import check_path
from nfnet_flax.prediction.images import Unreadable

# Why something that lies in a folder is not used.
_HIDDEN = "hidden files or folders"
_OTHER_NAME = f"files whose names end in none of {' '.join(IMAGE_SUFFIXES)}"
_DANGLING = "links to files that are not there"
_SPECIAL = "things that are neither files nor folders"
_SEEN = "links to folders that were read before, or in which they lie"

Found = str | Unreadable
"""The path of a file, or a place that cannot be read."""
_Counts = dict[str, tuple[int, str]]
"""Reason why files are not used -> their number, and the path of one of them."""


class ImageFiles:
    """The image files at several places. Folders are read during an iteration, so that the number of files does not
    matter; `unused` is complete after it."""

    def __init__(self, places: Sequence[str]) -> None:
        """Keeps the places, which exist."""
        self._places = tuple(places)
        self._unused: _Counts = {}

    def __iter__(self) -> Iterator[Found]:
        """Yields paths, and the folders that cannot be read."""
        self._unused.clear()
        for place in self._places:
            if os.path.isdir(place):
                yield from _walk(place, self._unused)
            else:
                yield place

    @property
    def unused(self) -> list[str]:
        """A sentence for each reason why files in the folders are not used."""
        return [f"not used are {_sentence(*item)}" for item in sorted(self._unused.items())]


def find_images(places: Sequence[str | os.PathLike[str]]) -> ImageFiles:
    """The image files that files, folders and patterns name, in the order in which these are given.

    A folder stands for all files in it, and in its sub-folders, that are named like images, in natural order (`2.jpg`
    before `10.jpg`); hidden ones are left out. A file that is given itself is used whatever its name. What exists is
    never taken for a pattern.

    Args:
      places: paths of files and folders, and shell-style patterns such as `photos/**/*.jpg`.

    Raises:
      ConfigError: there is none; or one does not exist, matches nothing, or is a folder without images.
    """
    remedy = "give a list of files, folders and patterns"
    require(not isinstance(places, str | os.PathLike | bytes), "images", places, remedy)
    require(len(places) > 0, "images", places, "give at least one file, folder or pattern")
    return find_named([("images", place) for place in places])


def find_named(places: Iterable[tuple[str, str | os.PathLike[str]]]) -> ImageFiles:
    """The image files at places; each of these comes with what names it in a message, such as `images`."""
    found: list[str] = []
    for where, place in places:
        paths = _existing(where, place)
        for path in filter(os.path.isdir, paths):
            _check_folder(where, path)
        found += paths
    return ImageFiles(found)


def _existing(where: str, place: str | os.PathLike[str]) -> list[str]:
    """The paths that a place stands for."""
    check_path(where, place)
    text = os.fspath(place)
    if os.path.lexists(text):
        return [text]
    text = os.path.expanduser(text)
    if os.path.lexists(text):
        return [text]
    if not glob.has_magic(text):
        raise ConfigError(f"{where} = {os.fspath(place)!r}: does not exist: give files, folders or patterns that do")
    pattern = _with_literal_start(text)
    paths = sorted(glob.glob(pattern, recursive=True), key=_natural)
    parents = {os.path.dirname(path.rstrip(os.sep)) for path in paths}
    paths = [path for path in paths if path.rstrip(os.sep) not in parents]  # what lies in these was found itself
    if not paths:
        raise ConfigError(f"{where} = {os.fspath(place)!r}: no file matches this pattern")
    return paths


def _with_literal_start(pattern: str) -> str:
    """A pattern in which the leading folders that exist by these very names, such as `photos [v2]`, are literal."""
    parts = pattern.split(os.sep)
    count = next(count for count in range(len(parts) - 1, -1, -1) if count == 0 or _exists(parts[:count]))
    literal = os.sep.join(parts[:count])
    return os.sep.join([*([glob.escape(literal)] if count else []), *parts[count:]])


def _exists(parts: Sequence[str]) -> bool:
    return os.path.lexists(os.sep.join(parts) or os.sep)


def _check_folder(where: str, folder: str) -> None:
    counts: _Counts = {}
    if next(_walk(folder, counts), None) is None:
        found = "".join(f"; it has {_sentence(*item)}" for item in counts.items())
        raise ConfigError(f"{where} = {folder!r}: there is no image in this folder{found}")


def _walk(top: str, unused: _Counts) -> Iterator[Found]:
    """The images of a folder and its sub-folders; the files of a folder come before its sub-folders."""
    waiting, seen = [top], _folders_around(top)
    while waiting:
        folder = waiting.pop()
        try:
            info = os.stat(folder)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: _natural(entry.name))
        except OSError as error:
            yield Unreadable(folder, f"the folder cannot be read: {error.strerror}")
            continue
        seen.add((info.st_dev, info.st_ino))
        inside: list[str] = []
        for entry in entries:
            try:
                target = entry.stat()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):
                    _count(unused, _HIDDEN if entry.name.startswith(".") else _DANGLING, entry.path)
                else:
                    yield Unreadable(entry.path, f"cannot be read: {error.strerror}")
                continue
            is_folder = stat.S_ISDIR(target.st_mode)
            if entry.name.startswith(".") and entry.name.endswith(f".{os.getpid()}.partial"):
                continue  # the results of this very command
            if entry.name.startswith("."):
                _count(unused, _HIDDEN, entry.path)
            elif is_folder and entry.is_symlink() and (target.st_dev, target.st_ino) in seen:
                _count(unused, _SEEN, entry.path)  # a loop of links would never end, and one to / would read the disk
            elif is_folder:
                inside.append(entry.path)
            elif not stat.S_ISREG(target.st_mode):
                _count(unused, _SPECIAL, entry.path)
            elif not is_image_name(entry.name):
                _count(unused, _OTHER_NAME, entry.path)
            else:
                yield entry.path
        waiting += reversed(inside)


def _folders_around(folder: str) -> set[tuple[int, int]]:
    """Device and number of the folders in which a folder lies."""
    found = set[tuple[int, int]]()
    for around in Path(os.path.realpath(folder)).parents:
        with contextlib.suppress(OSError):
            info = around.stat()
            found.add((info.st_dev, info.st_ino))
    return found


def _natural(name: str) -> tuple[list[str | int], str]:
    """Key that sorts numbers in names by their value."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = [int(part) for part in parts[1::2]]  # texts and numbers alternate
    return parts, name


def _count(counts: _Counts, reason: str, path: str) -> None:
    number, example = counts.get(reason, (0, path))
    counts[reason] = (number + 1, example)


def _sentence(reason: str, found: tuple[int, str]) -> str:
    count, example = found
    return f"{count:,} {reason}, such as {example!r}"
