"""The files (shards) of a set that is stored as Parquet files or tar files: which there are, and where they are read.

A shard is named by its path, or by its URL in a bucket. Only this file looks into the folders of shards, and all code
that reads a shard does so by `shard_file`, `read_bytes` and `shard_size`: shards that are in a bucket are copied or
read directly there and nowhere else. `shard_stamp` changes when a shard does, so that what was derived from it is made
again.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nfnet_flax.config import ConfigError
from nfnet_flax.data.bucket_shards import shards_with
from nfnet_flax.data.buckets import Place, found_by, is_file, is_folder, names_in
from nfnet_flax.data.shard_series import check_one_split, check_series, expand_braces, split_word
from nfnet_flax.storage import bucket_url
from nfnet_flax.units import shown

_LFS_START = b"version https://git-lfs"
_LFS_MAX_BYTES = 1024
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|br|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_MAGIC = re.compile(r"[*?[]")


class ShardKind(NamedTuple):
    """A kind of shards."""

    suffix: str
    """Ending of the names of the files."""
    what: str
    """The name of the kind for messages, in the singular."""


PARQUET = ShardKind(".parquet", "Parquet file")
TAR = ShardKind(".tar", "tar file")


@contextlib.contextmanager
def shard_file(shard: str) -> Iterator[str]:
    """Path of a file on a disk of this machine that holds a shard, as long as the context lasts.

    Raises:
      ConfigError: the shard in the bucket has been replaced, or there is no room for a copy of it.
      OSError: the store or the disk failed.
    """
    if (shards := shards_with(shard)) is None:
        yield shard
    else:
        with shards.held(shard) as path:
            yield str(path)


def read_bytes(shard: str, offset: int, size: int) -> bytes:
    """Some bytes of a shard, or fewer if it ends earlier. The file is opened for each call: that takes 10 microseconds
    on a local disk, and no limit of open files is reached, however many shards there are.

    Raises:
      ConfigError: the shard in the bucket has been replaced.
      OSError: it cannot be opened or read.
    """
    if (shards := shards_with(shard)) is not None:
        end = min(offset + size, shards.size(shard))
        return shards.read(shard, offset, end) if end > offset else b""
    descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def shard_source(shard: str) -> "str | RemoteFile":
    """What a library opens that reads parts of a shard: its path, or a file object."""
    return shard if shards_with(shard) is None else RemoteFile(shard)


class RemoteFile(io.RawIOBase):
    """A shard in a bucket as a file object; what is read comes from its copy if there is one."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: shard_size(self._shard)}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        found = read_bytes(self._shard, self._position, len(buffer))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def shard_size(shard: str) -> int:
    """Number of bytes of a shard.

    Raises:
      OSError: it is not there, or the disk failed.
    """
    shards = shards_with(shard)
    return os.stat(shard).st_size if shards is None else shards.size(shard)


def shard_stamp(shard: str) -> str:
    """A text that changes if the shard does: its size, and the time of its last change or its checksum.

    Raises:
      OSError: it is not there, or the disk failed.
    """
    if (shards := shards_with(shard)) is not None:
        return shards.stamp(shard)
    found = os.stat(shard)
    return f"{found.st_size} bytes, {found.st_mtime_ns} ns"


def folder_of(shard: str) -> Place:
    """The folder of a shard."""
    url = bucket_url("shard", shard)
    return Path(shard).parent if url is None else url.parent


def shards_in(folder: Place, kind: ShardKind) -> list[str]:
    """The shards that lie directly in a folder, sorted; none if there is no such folder. Hidden files are left out."""
    return [str(folder / name) for name in names_in(folder)[0] if name.endswith(kind.suffix)]


def splits_in(root: Path, kind: ShardKind) -> tuple[str, ...]:
    """The words by which shards in a folder, in `data` there and in folders of splits say which split they are of."""
    words = []
    for folder in (root, root / "data"):
        files, folders = names_in(folder)
        words += [split_word(name) for name in files if name.endswith(kind.suffix) or _is_compressed_tar(name, kind)]
        words += [name for name in folders if name == split_word(f"{name}.") and shards_in(folder / name, kind)]
    return tuple(dict.fromkeys(word for word in words if word is not None))


def check_is_no_pointer(shard: str) -> None:
    """Raises ConfigError for a shard of which only Git's pointer to it was fetched, and for an empty file."""
    start = read_bytes(shard, 0, _LFS_MAX_BYTES)
    if start.startswith(_LFS_START):
        raise ConfigError(
            f"{shard!r} is a pointer of Git LFS, not the file itself: run `git lfs pull` in that folder, or download "
            "the file"
        )
    if not start:
        raise ConfigError(f"{shard!r} is empty (0 bytes): copy or download it again")


def find_shards(field: str, root: Place, entries: Sequence[str], kind: ShardKind) -> list[str]:
    """The shards that a field names, sorted by their paths.

    Args:
      field: name of the field, for messages.
      root: folder from which the entries start.
      entries: each is the name of a split (`train`, `data/train`), a folder, a file, or a pattern (`train-*.parquet`,
        `train-{0000..1023}.tar`).
      kind: which files.

    Raises:
      ConfigError: an entry finds nothing, a file of another kind, files of several splits, a part of a numbered series,
        or files in two places.
      OSError: a bucket cannot be listed.
    """
    if not is_folder(root):
        is_shard = root.name.endswith(kind.suffix)
        hint = " (give its folder, and its name by --data.source.train)" if is_shard else ""
        raise ConfigError(f"source.root = {str(root)!r} is no folder{hint}: give the folder of the {kind.what}s")
    return sorted({shard for entry in entries for shard in _of_entry(field, root, entry, kind)})


def _place(root: Place, entry: str) -> Place:
    """The place that an entry names, which starts from a folder unless it is absolute or a URL."""
    if (url := bucket_url("entry", entry)) is not None:
        return url
    if isinstance(root, Path):
        return root / Path(entry).expanduser()
    place = root
    for part in entry.split("/"):
        place = place.parent if part == ".." else place if part in ("", ".") else place / part
    return place


def _of_entry(field: str, root: Place, entry: str, kind: ShardKind) -> list[str]:
    said = f"{field} = {entry!r}"
    place = _place(root, entry)
    folder, slash, name = entry.rpartition("/")
    if slash and is_folder(_place(root, folder)):  # it is meant as it is, whatever characters it has
        patterns = [f"{folder}/{expanded}" for expanded in expand_braces(said, name)]
    else:
        patterns, name = expand_braces(said, entry), entry
    if patterns != [entry] or _MAGIC.search(name):
        shards = _of_patterns(said, root, patterns, kind)
    elif _is_compressed_tar(entry, kind):
        raise _compressed(said, [entry])
    elif place.name.endswith(kind.suffix) or is_file(place):
        return [_existing(said, place, kind)]
    else:
        names_folder = Path(entry).name in ("", "..") or entry.endswith("/")
        shards = _of_folder(said, place, kind) if names_folder else _of_split(said, place, kind)
    check_one_split(said, shards)
    if patterns == [entry]:  # numbers in braces say themselves which part is wanted
        check_series(said, shards)
    return shards


def _of_patterns(said: str, root: Place, patterns: Sequence[str], kind: ShardKind) -> list[str]:
    found = {pattern: _matching(said, root, pattern, kind) for pattern in patterns}
    missing = [pattern for pattern, shards in found.items() if not shards]
    if missing and len(patterns) == 1:
        there_is = _there_is(_place(root, missing[0]).parent, kind)
        raise ConfigError(f"{said}: no file in {str(root)!r} matches{there_is}")
    if missing:
        raise ConfigError(
            f"{said}: {len(missing)} of {len(patterns)} files are missing in {str(root)!r}, such as {missing[0]!r}: "
            "copy them, or correct the pattern"
        )
    return [shard for shards in found.values() for shard in shards]


def _existing(said: str, place: Place, kind: ShardKind) -> str:
    if not is_file(place):
        raise ConfigError(f"{said}: {str(place)!r} is no file that can be found{_there_is(place.parent, kind)}")
    if not place.name.endswith(kind.suffix):
        raise ConfigError(f"{said}: is not named like a {kind.what}: its name must end in {kind.suffix}")
    return str(place)


def _matching(said: str, root: Place, pattern: str, kind: ShardKind) -> list[str]:
    found = found_by(_place(root, pattern))
    other = [path for path in found if not path.endswith(kind.suffix) and not os.path.isdir(path)]
    if packed := [path for path in other if _is_compressed_tar(path, kind)]:
        raise _compressed(said, packed)
    if other:
        raise ConfigError(
            f"{said}: finds {other[0]!r}, which is not named like a {kind.what}: give a pattern that ends in "
            f"{kind.suffix}"
        )
    return [path for path in found if path.endswith(kind.suffix)]


def _of_split(said: str, place: Place, kind: ShardKind) -> list[str]:
    """The shards of a split: files whose names contain its name, beside the place or in `data` there, or all files of
    a folder that is named like it."""
    found: dict[str, list[str]] = {}
    for folder in dict.fromkeys((place, place.parent / "data" / place.name, place.parent, place.parent / "data")):
        named = names_in(folder)[0]
        if folder.name != place.name or folder == place.parent:
            named = [name for name in named if split_word(name, place.name) == place.name.lower()]
        if packed := [name for name in named if _is_compressed_tar(name, kind)]:
            raise _compressed(said, packed)
        if shards := [str(folder / name) for name in named if name.endswith(kind.suffix)]:
            found[str(folder)] = shards
    if not found:
        raise ConfigError(
            f"{said}: {str(place.parent)!r} has no {kind.what} of that split, such as "
            f"{place.name}-00000-of-00010{kind.suffix}{_there_is(place.parent, kind)}"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{said}: is found in {shown(list(map(repr, found)))}: name one of them by a pattern, such as "
            f"'data/{place.name}-*{kind.suffix}'"
        )
    return next(iter(found.values()))


def _of_folder(said: str, place: Place, kind: ShardKind) -> list[str]:
    """All shards that lie directly in a folder."""
    if packed := [name for name in names_in(place)[0] if _is_compressed_tar(name, kind)]:
        raise _compressed(said, packed)
    if not (shards := shards_in(place, kind)):
        raise ConfigError(f"{said}: {str(place)!r} has no {kind.what}{_there_is(place, kind)}")
    return shards


def _is_compressed_tar(name: str, kind: ShardKind) -> bool:
    return kind is TAR and _COMPRESSED_TAR.search(name) is not None


def _compressed(said: str, paths: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{said}: {paths[0]!r} is a compressed tar file, which has no random access ({len(paths)} such files): "
        "decompress it, such as by `gunzip` (images are compressed themselves, so it hardly grows)"
    )


def _there_is(folder: Place, kind: ShardKind) -> str:
    """The end of a message that nothing was found: what is there instead."""
    names = [Path(path).name for path in shards_in(folder, kind) + shards_in(folder / "data", kind)]
    if not names:
        names = names_in(folder)[0]
    return f"; there is {shown(names)}: correct the name" if names else ": check the path"
