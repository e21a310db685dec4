"""The room that copies of objects may take on a disk, and which of them are deleted for others."""

import contextlib
import errno
import json
import os
import shutil
import uuid
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nfnet_flax.storage.file_locks import hold, locked

_RESERVE_SHARE, _RESERVE_BYTES = 0.05, 10 << 30
"""What is left free on a disk for other files, such as checkpoints: this share of it, and at most so many bytes."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that is full."""
_BESIDE = (".json", ".lock", ".partial")


class _Copy(NamedTuple):
    path: Path
    num_bytes: int
    used_s: float


class CacheRoom:
    """Room in a folder of copies, for all processes of this host."""

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._claims = folder / "claims"
        self._claim: tuple[Path, int] | None = None
        self._claimed: Counter[str] = Counter()

    def free_bytes(self) -> int:
        """Number of bytes that copies may still take, if none is deleted; may be negative."""
        folder = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        usage = shutil.disk_usage(folder)
        on_disk = usage.free - min(int(_RESERVE_SHARE * usage.total), _RESERVE_BYTES)
        if self.limit_bytes is None:
            return on_disk
        return min(on_disk, self.limit_bytes - sum(copy.num_bytes for copy in self._copies()))

    def claim(self, paths: Iterable[Path]) -> None:
        """Adds copies to those that are not deleted as long as this object lives, or until they are released as often
        as they were claimed. They need not be there yet."""
        names = [str(path.relative_to(self.folder)) for path in paths]
        self._claims.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "room.lock", wait=True):
            if self._claim is None:
                path = self._claims / f"{os.getpid()}-{uuid.uuid4().hex}"
                descriptor = hold(path)
                assert descriptor is not None
                self._claim = path, descriptor
                weakref.finalize(self, _release, path, descriptor)
            self._claimed.update(names)
            self._write_claims()
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self.folder / f"{name}.json")  # the time of its last use

    def release(self, paths: Iterable[Path]) -> None:
        """Takes back a claim."""
        with locked(self.folder / "room.lock", wait=True):
            self._claimed -= Counter(str(path.relative_to(self.folder)) for path in paths)
            self._write_claims()

    def _write_claims(self) -> None:
        assert self._claim is not None
        os.ftruncate(self._claim[1], 0)
        os.pwrite(self._claim[1], json.dumps(sorted(self._claimed)).encode(), 0)

    def reserve(self, partial: Path, num_bytes: int) -> bool:
        """Makes the file of a copy that is to be made, with all of its room; deletes other copies if needed.

        Copies are deleted that no living process has claimed, those first whose last use is longest ago. The caller
        holds the lock of the copy.

        Returns:
          Whether there is room. If not, there is no such file.
        """
        with locked(self.folder / "room.lock", wait=True):
            partial.unlink(missing_ok=True)
            missing = num_bytes - self.free_bytes()
            if missing > 0:
                claimed = self._all_claimed()
                unclaimed = [copy for copy in self._copies() if str(copy.path.relative_to(self.folder)) not in claimed]
                unclaimed = [copy for copy in unclaimed if copy.path != partial]
                if sum(copy.num_bytes for copy in unclaimed) < missing:
                    return False
                for copy in sorted(unclaimed, key=lambda copy: copy.used_s):
                    if (missing := num_bytes - self.free_bytes()) <= 0:
                        break
                    _delete(copy.path)
                if num_bytes > self.free_bytes():
                    return False
            return _allocate(partial, num_bytes)

    def _copies(self) -> Iterator[_Copy]:
        """All copies, also those that are being made."""
        for path in self.folder.glob("*/*"):
            if path.parent == self._claims or path.suffix in (".json", ".lock") or path.name.startswith("."):
                continue  # a dot begins the names of files that `write_whole` is writing, beside copies
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                used_s = about.st_mtime
                with contextlib.suppress(FileNotFoundError):
                    used_s = path.with_name(path.name + ".json").stat().st_mtime
                yield _Copy(path, about.st_size, used_s)

    def _all_claimed(self) -> set[str]:
        """Names of the copies that living processes have claimed; claims of processes that have ended are deleted."""
        found = set(self._claimed)
        for path in self._claims.glob("*"):
            if self._claim is not None and path == self._claim[0]:
                continue
            descriptor = hold(path)
            if descriptor is not None:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                os.close(descriptor)
                continue
            with contextlib.suppress(FileNotFoundError, ValueError):
                found |= set(json.loads(path.read_bytes()))
        return found


def _release(claim: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        claim.unlink()
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Deletes a copy and the files beside it, unless it is being made."""
    name = path.name.removesuffix(".partial")
    with locked(path.with_name(f"{name}.lock"), wait=False) as is_mine:
        if not is_mine:
            return
        for suffix in ("", *_BESIDE):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(name + suffix).unlink()


def _allocate(path: Path, num_bytes: int) -> bool:
    """Makes a file with room for so many bytes; False, and no file, if the disk has not got it."""
    with path.open("wb") as file:
        try:
            if num_bytes:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            return True
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # room is then taken when the bytes are written
                os.ftruncate(file.fileno(), num_bytes)
                return True
            path.unlink(missing_ok=True)
            if error.errno in NO_ROOM:
                return False
            raise
