"""Keeps the indexes of shards: beside the shards, or where nothing can be written there (as in a bucket, into which
training does not write), in a folder of the user.

An index is used if it belongs to the shard as it is now (`shard_stamp`); it is made again if it does not, or if it is
damaged. Of several processes that start at the same time, one makes the indexes, and the others wait for it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Protocol

from nfnet_flax.config import ConfigError
from nfnet_flax.data.buckets import Place
from nfnet_flax.data.random_access import digest
from nfnet_flax.data.shard_files import folder_of, shard_file, shard_size, shard_stamp
from nfnet_flax.data.shard_index import DamagedIndex, ShardIndex
from nfnet_flax.json_files import write_whole
from nfnet_flax.messages import warn
from nfnet_flax.paths import user_cache
from nfnet_flax.progress import track
from nfnet_flax.storage import BucketUrl
from nfnet_flax.units import human_size

FOLDER = ".nfnet_index"
"""Name of the folder beside the shards."""
_COPY_SUFFIX = ".images"
_PARTIAL_SUFFIX = ".partial"
# Reading a small file, or finding the members of a large one, mostly means waiting for the disk or the network.
_NUM_READERS, _NUM_MAKERS = 16, 4


class NoIndexYet(ConfigError):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """Files in a bucket have no index, and none may be written."""


class Maker(Protocol):
    """Makes the index of a shard of some kind."""

    @property
    def key(self) -> str:
        """A text that is other if the same shard would get another index, such as the names of columns."""

    def make(self, shard: str, copy: Path | None) -> ShardIndex:
        """The index of a shard.

        Args:
          shard: which shard.
          copy: file that may be written with a copy of the images if these have no fixed place in the shard; None:
            nothing may be written.

        Raises:
          ConfigError: the shard is damaged, or something else than it should be.
          OSError: it cannot be read, or the copy cannot be written.
        """

    def copied_bytes(self, shard: str) -> int:
        """Number of bytes of the images that `make` copies, approximately; 0 if it copies none."""


@dataclasses.dataclass(frozen=True)
class IndexStore:
    """Where indexes are kept."""

    cache: Path | None
    """Folder that the user has chosen for them; None: beside the shards, or in the user's cache folder."""
    is_kept: bool = True
    """Whether indexes and copies are written. If not, those that are there are used, and others made in memory."""
    copies: bool = True
    """Whether images that have no fixed place in their shard are copied."""

    def indexes(self, shards: Sequence[str], maker: Maker) -> list[ShardIndex]:
        """The indexes of shards, in their order.

        Raises:
          NoIndexYet: files are in a bucket, have no index, and none is to be written.
          ConfigError, OSError: as for `Maker.make`; or there is no room for the copies, or the chosen folder cannot be
            written.
        """
        with ThreadPoolExecutor(_NUM_READERS) as threads:
            kept = threads.map(lambda shard: self._kept(shard, maker), shards)
            text = f"reading the index of {folder_of(shards[0])}" if shards else ""
            found = dict(zip(shards, track(kept, text, "files", len(shards)), strict=True))
        of_folder: dict[Place, list[str]] = {}
        for shard in shards:
            if found[shard] is None:
                of_folder.setdefault(folder_of(shard), []).append(shard)
        for parent, missing in of_folder.items():
            if not self.is_kept and isinstance(parent, BucketUrl):
                size = human_size(sum(map(shard_size, missing)))
                raise NoIndexYet(
                    f"{len(missing)} files in {parent} have no index yet: the first start with source.keep_index makes "
                    f"it, for which it reads all of them ({size}), once on each host"
                )
            folder = self._writable(parent) if self.is_kept else None
            with contextlib.nullcontext() if folder is None else _sole_maker(folder):
                # Another process may have made them while this one waited.
                again = {shard: None if folder is None else self._kept(shard, maker) for shard in missing}
                rest = [shard for shard in missing if again[shard] is None]
                found |= again | self._made(rest, maker, folder)
        return [index for shard in shards if (index := found[shard]) is not None]

    def _folders(self, parent: Place) -> list[Path]:
        """Folders in which the indexes of the shards of a folder may be, in the order in which they are tried."""
        if self.cache is not None:
            return [self.cache / digest(str(parent))]
        folders = [parent / FOLDER] if isinstance(parent, Path) else []
        with contextlib.suppress(RuntimeError):  # there is no home folder
            folders.append(user_cache("index") / digest(str(parent)))
        return folders

    def _kept(self, shard: str, maker: Maker) -> ShardIndex | None:
        """The index of a shard if there is one that belongs to it as it is now, with all that is wanted."""
        stamp = shard_stamp(shard)
        for folder in self._folders(folder_of(shard)):
            path = folder / _index_name(shard, maker)
            try:
                index = ShardIndex.from_bytes(path.read_bytes(), stamp)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            except DamagedIndex as error:
                warn(f"{path} is damaged ({error}): it is made again")
                continue
            if index is not None and (found := self._with_copy(index, folder)) is not None:
                return found
        return None

    def _with_copy(self, index: ShardIndex, folder: Path) -> ShardIndex | None:
        """The index with the place of the copy that it refers to; None if the copy is missing, or if one is wanted."""
        copy = index.facts.get("copy")
        if copy is None:
            return None if self.copies and self.is_kept and index.facts.get("has_rows") else index
        path = folder / copy
        try:
            is_whole = path.stat().st_size == index.sizes.sum()
        except FileNotFoundError:
            is_whole = False
        return dataclasses.replace(index, facts={**index.facts, "copy": str(path)}) if is_whole else None

    def _writable(self, parent: Place) -> Path | None:
        """The first folder that can be written, made if necessary; None, with a warning, if there is none."""
        reasons = []
        for folder in self._folders(parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".writable.{os.getpid()}"
                probe.touch()
                probe.unlink()
                return folder
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror}")
        if self.cache is not None:
            raise ConfigError(f"source.cache = {str(self.cache)!r}: cannot be written ({reasons[0]}): give another one")
        warn(
            f"the index of {parent} cannot be kept, and is made at each start ({'; '.join(reasons)}): give a folder by "
            "--data.source.cache"
        )
        return None

    def _made(self, shards: Sequence[str], maker: Maker, folder: Path | None) -> dict[str, ShardIndex]:
        """New indexes, which are written to the folder."""
        if not shards:
            return {}
        parent = folder_of(shards[0])
        if folder is not None and self.copies:
            _announce_copies(shards, maker, folder)
        found: dict[str, ShardIndex] = {}
        with _threads(_NUM_MAKERS) as threads:
            futures = {threads.submit(self._make, shard, maker, folder): shard for shard in shards}
            for future in track(as_completed(futures), f"making the index of {parent}", "files", len(shards)):
                found[futures[future]] = future.result()
        if folder is not None:
            warn(f"{len(shards)} files in {parent} were indexed, once; the index is in {folder}")
        return found

    def _make(self, shard: str, maker: Maker, folder: Path | None) -> ShardIndex:
        stamp = shard_stamp(shard)
        if folder is None:
            with shard_file(shard):  # all of it is needed
                return maker.make(shard, None)
        try:
            with shard_file(shard):
                index = self._written(shard, stamp, maker, folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"{folder}: {error.strerror}: make room, or give --data.source.cache") from error
        if shard_stamp(shard) != stamp:
            raise ConfigError(f"{shard!r} was changed while it was read: start again when it is complete")
        return index

    def _written(self, shard: str, stamp: str, maker: Maker, folder: Path) -> ShardIndex:
        name = _index_name(shard, maker)
        if not self.copies:
            index = maker.make(shard, None)
        else:
            copy = folder / f"{name}.{digest(stamp)[:8]}{_COPY_SUFFIX}"
            index = _with_copy_at(copy, lambda partial: maker.make(shard, partial))
            for old in folder.glob(f"{glob.escape(name)}.*{_COPY_SUFFIX}"):
                if old != copy:
                    old.unlink()
        write_whole(folder / name, index.to_bytes(stamp))
        found = self._with_copy(index, folder)
        return index if found is None else found


def _with_copy_at(copy: Path, make: Callable[[Path], ShardIndex]) -> ShardIndex:
    """An index whose copy of the images, if it made one, has got its final name."""
    partial = copy.with_name(f"{copy.name}.{os.getpid()}{_PARTIAL_SUFFIX}")
    try:
        index = make(partial)
        if not partial.exists():
            return index
        partial.replace(copy)
        return dataclasses.replace(index, facts={**index.facts, "copy": copy.name})
    finally:
        partial.unlink(missing_ok=True)


def _index_name(shard: str, maker: Maker) -> str:
    return f"{Path(shard).name}.{digest(maker.key)[:8]}"


def _announce_copies(shards: Sequence[str], maker: Maker, folder: Path) -> None:
    """Says how much will be copied, and raises ConfigError if there is no room for it."""
    sizes = [size for shard in shards if (size := maker.copied_bytes(shard))]
    if not sizes:
        return
    needed, free = sum(sizes), shutil.disk_usage(folder).free
    where = f"{len(sizes)} of {len(shards)} files in {folder_of(shards[0])} have compressed images"
    if needed > free:
        raise ConfigError(
            f"{where}, which random access needs as a copy of {human_size(needed)}, and {folder} has "
            f"{human_size(free)} free: make room, give another folder by --data.source.cache, or write the set "
            "without compression"
        )
    warn(f"{where}: they are copied to {folder}, once, as {human_size(needed)}, for random access")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that end early if something fails or the user stops the program."""
    threads = ThreadPoolExecutor(count)
    try:
        yield threads
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _sole_maker(folder: Path) -> Iterator[None]:
    """Waits until no other process makes indexes in the folder, where the file system knows locks. (Without locks,
    several processes make the same files, each of which gets its name when it is complete.)"""
    with open(folder / ".lock", "w") as lock:
        if _lock(lock, folder):
            for partial in folder.glob(f"*{_PARTIAL_SUFFIX}"):  # of a process that was killed
                partial.unlink(missing_ok=True)
        yield


def _lock(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        warn(f"another process is making the index in {folder}: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
