"""Copies of objects on a disk of this machine, which all of its processes share.

Each version of an object has an entry: a file that is complete and was compared with the store's checksum, or is not
there. A folder holds the entries of one folder in a bucket:

    KEY-NAME            the copy; it gets this name when it is complete
    KEY-NAME.json       what was copied, written just before; a copy that differs from it is not used
    KEY-NAME.partial    a copy that is being made
    KEY-NAME.lock       held by the process that makes it

A process that is killed leaves at most a partial copy, which the next one begins anew: a shard takes seconds.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

from nfnet_flax.json_files import StorageFailed, write_json
from nfnet_flax.storage.background import BackgroundThreads
from nfnet_flax.storage.cache_room import NO_ROOM, CacheRoom
from nfnet_flax.storage.file_locks import locked
from nfnet_flax.storage.objects import ObjectFolder, StoredObject, digests
from nfnet_flax.storage.url import BucketUrl

PARTIAL, RECORD, LOCK = ".partial", ".json", ".lock"
"""Suffixes of the files beside a copy."""
Outcome = Literal["there", "busy", "no room"]
"""Whether there is a copy; `busy`: another process makes it."""
_PART_BYTES = 8 << 20
"""Number of bytes that one request reads: at 0.3 MB/s it is done within the time limit."""
_NUM_PARTS = 8
"""Number of requests of a process at the same time: 64 MiB of memory."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An object of which a copy is wanted."""

    url: BucketUrl
    """Its place."""
    about: StoredObject
    """Its version."""
    blake2b: str | None = None
    """Hexadecimal BLAKE2b (64 bytes) of its content, if that is known from elsewhere."""


class DamagedObject(Exception):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """What the store holds is not what is known of it from elsewhere. The message names it."""


class ObjectCache:
    """A folder of copies. Each method raises `OSError` if its disk fails."""

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        """Makes nothing yet.

        Args:
          folder: the folder.
          limit_bytes: number of bytes that all copies may take; None: what the disk has, except a reserve.
        """
        self.folder = folder
        self.room = CacheRoom(folder, limit_bytes)
        self._seen: dict[Path, tuple[int, int, int]] = {}
        self._readers = BackgroundThreads(_NUM_PARTS, "copies")

    def __reduce__(self) -> tuple[type["ObjectCache"], tuple[Path, int | None]]:
        return ObjectCache, (self.folder, self.room.limit_bytes)

    def path(self, wanted: Wanted) -> Path:
        """Where the copy of an object is, or would be."""
        parent = wanted.url.parent
        where = hashlib.blake2b(str(parent).encode(), digest_size=6).hexdigest()
        place = f"{parent.scheme}-{parent.bucket}-{_UNSAFE.sub('_', parent.name)[:40]}-{where}"
        version = hashlib.blake2b(f"{wanted.about.size} {wanted.about.checksum}".encode(), digest_size=6).hexdigest()
        return self.folder / place / f"{version}-{_UNSAFE.sub('_', wanted.url.name)}"

    def copy(self, wanted: Wanted) -> Path | None:
        """The copy of an object, if it is there and is as it was written."""
        path = self.path(wanted)
        try:
            now = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        state = (now.st_ino, now.st_size, now.st_mtime_ns)
        if self._seen.get(path) != state:
            if (now.st_size, now.st_mtime_ns) != _recorded(path):
                return None
            self._seen[path] = state
        return path

    def claim(self, wanted: Iterable[Wanted]) -> None:
        """Keeps copies, also future ones, from being deleted for others, as long as this object lives or until they are
        released."""
        self.room.claim([self.path(one) for one in wanted])

    def release(self, wanted: Iterable[Wanted]) -> None:
        """Takes back a claim."""
        self.room.release([self.path(one) for one in wanted])

    def discard(self, wanted: Wanted) -> None:
        """Deletes the copy of an object, as it turned out to be damaged."""
        path = self.path(wanted)
        self._seen.pop(path, None)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def fetch(self, wanted: Wanted) -> Outcome:
        """Makes a copy, unless there is one.

        Raises:
          ObjectChanged: the object has been replaced or deleted.
          DamagedObject: its BLAKE2b is not the wanted one.
          StorageFailed: it cannot be read.
        """
        path = self.path(wanted)
        if self.copy(wanted) is not None:
            return "there"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + LOCK), wait=False) as is_mine:
            if not is_mine:
                return "busy"
            if self.copy(wanted) is not None:
                return "there"
            partial = path.with_name(path.name + PARTIAL)
            self.discard(wanted)
            if not self.room.reserve(partial, wanted.about.size):
                return "no room"
            try:
                _write_record(path, partial, wanted, self._download(wanted, partial))
                partial.replace(path)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    partial.unlink()
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    return "no room"
                raise
        return "there"

    def _download(self, wanted: Wanted, partial: Path) -> str:
        """Downloads an object and compares it; returns its BLAKE2b."""
        is_opaque = wanted.about.checksum.startswith("etag:")
        earlier = set[str]()
        for _ in range(3):
            self._download_parts(wanted, partial)
            checksum, blake2b = digests(partial, wanted.about)
            # An ETag of S3 need not be an MD5, even if it looks like one (objects encrypted by a key of KMS).
            is_sure = wanted.url.scheme == "s3" and blake2b in earlier
            is_sure |= checksum == wanted.about.checksum and not is_opaque
            if blake2b == wanted.blake2b or (wanted.blake2b is None and (is_sure or is_opaque)):
                return blake2b
            if is_sure:
                raise DamagedObject(f"{wanted.url} is not the file that its manifest describes (its BLAKE2b differs)")
            earlier.add(blake2b)
        raise StorageFailed(
            f"{wanted.url}: what comes has another checksum than the store says ({wanted.about.checksum}), three times"
        )

    def _download_parts(self, wanted: Wanted, partial: Path) -> None:
        folder, size = ObjectFolder(wanted.url.parent), wanted.about.size
        with partial.open("r+b") as file:

            def part(start: int) -> None:
                end = min(start + _PART_BYTES, size)
                os.pwrite(file.fileno(), folder.read_version(wanted.url.name, wanted.about, start, end), start)

            _wait_for_all([self._readers.submit(part, start) for start in range(0, size, _PART_BYTES)])
            os.fsync(file.fileno())


def _write_record(path: Path, partial: Path, wanted: Wanted, blake2b: str) -> None:
    now = partial.stat()
    about = {"url": str(wanted.url), "checksum": wanted.about.checksum, "blake2b": blake2b}
    state = {"num_bytes": now.st_size, "mtime_ns": now.st_mtime_ns}
    write_json(path.with_name(path.name + RECORD), {**about, **state})


def _recorded(path: Path) -> tuple[int, int] | None:
    """Size and time of change that a copy had when it was complete; None if that is unknown."""
    try:
        about = json.loads(path.with_name(path.name + RECORD).read_bytes())
        return int(about["num_bytes"]), int(about["mtime_ns"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _wait_for_all(futures: list[Future[None]]) -> None:
    """Waits for calls; after an error, those that have not begun are left out."""
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            if not future.cancel():
                with contextlib.suppress(BaseException):
                    future.result()
