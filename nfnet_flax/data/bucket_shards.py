"""Files (shards) of a set that lies in a bucket: read from copies on this machine, and directly where there is none.

Every batch of a shuffled epoch needs records of nearly all shards, and every shard is needed equally often. So training
does not wait for copies: a record whose shard is not there yet is read by a request of its own, while all shards are
copied in the background. If there is not room for all copies, those that are there stay, and the rest of the records
is read directly for good: to copy a shard again and again for a few records would move far more bytes.
(`tools/bench_buckets.py` compares these ways.)
"""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.data.buckets import failing
from nfnet_flax.data.copying import LOOK_S, Copying
from nfnet_flax.data.random_access import Copies
from nfnet_flax.messages import warn
from nfnet_flax.storage.cache import ObjectCache, Outcome, Wanted
from nfnet_flax.storage.objects import ObjectChanged, ObjectFolder
from nfnet_flax.storage.url import is_url
from nfnet_flax.units import human_size

_OPEN: "weakref.WeakValueDictionary[str, BucketShards]" = weakref.WeakValueDictionary()
"""URL of a shard -> the set that was opened with it, last, and is still in use."""


def shards_with(shard: str) -> "BucketShards | None":
    """The opened set in which a shard is; None for a path of this machine."""
    return _OPEN[shard] if is_url(shard) else None


class BucketShards:
    """Shards in buckets. It may be pickled; the process that copies must outlive those that read."""

    def __init__(self, wanted: Sequence[Wanted], cache: ObjectCache) -> None:
        """Reads and writes nothing yet.

        Args:
          wanted: the shards. A shard is named by the text of its URL.
          cache: where copies are kept.
        """
        self.cache = cache
        self._wanted = {str(one.url): one for one in wanted}
        self._failure: str | None = None
        self._begin()

    def _begin(self) -> None:
        self._num_served = 0
        self._lock = threading.Lock()
        for shard in self._wanted:
            _OPEN[shard] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_num_served", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def copy(self, shard: str) -> Path | None:
        """The copy of a shard, if there is one."""
        try:
            return self.cache.copy(self._wanted[shard])
        except OSError:  # a folder that cannot be read is as good as none; who copies reports it
            return None

    def part(self, shards: Iterable[str]) -> "BucketShards":
        """Some of the shards, as an object of their own."""
        return BucketShards([self._wanted[shard] for shard in shards], self.cache)

    def size(self, shard: str) -> int:
        """Number of bytes of a shard."""
        return self._wanted[shard].about.size

    def stamp(self, shard: str) -> str:
        """A text that changes if the shard does."""
        about = self._wanted[shard].about
        return f"{about.size} bytes, {about.checksum}"

    @contextlib.contextmanager
    def held(self, shard: str) -> Iterator[Path]:
        """The copy of a shard, which is made if there is none, and stays there as long as the context lasts.

        Raises:
          ConfigError: the shard has been replaced, or there is no room for it.
          OSError: the store or the disk failed.
        """
        wanted = self._wanted[shard]
        self.cache.claim([wanted])
        with self._lock:
            self._num_served += 1
        try:
            while (path := self.copy(shard)) is None:
                outcome = self.fetch(shard)
                if outcome == "no room":
                    self._wait_for_room(shard)
                elif outcome == "busy":
                    time.sleep(LOOK_S)
            yield path
        finally:
            with self._lock:
                self._num_served -= 1
            self.cache.release([wanted])

    def _wait_for_room(self, shard: str) -> None:
        """Waits for other threads, which may release copies; raises ConfigError if there are none."""
        with self._lock:
            self._num_served -= 1
            are_others = self._num_served > 0
        try:
            if not are_others:
                raise ConfigError(f"{shard} ({human_size(self.size(shard))}): {self.no_room()}")
            time.sleep(LOOK_S)
        finally:
            with self._lock:
                self._num_served += 1

    def read(self, shard: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (not included) of a shard, from its copy if there is one.

        Raises:
          ConfigError: the shard has been replaced.
          OSError: the store failed.
        """
        if (path := self.copy(shard)) is not None:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    found = os.pread(descriptor, end - start, start)
                finally:
                    os.close(descriptor)
                if len(found) == end - start:
                    return found
        return self.read_directly(shard, start, end)

    def read_directly(self, shard: str, start: int, end: int) -> bytes:
        """Bytes of a shard from its bucket; otherwise like `read`."""
        if self._failure is not None:
            raise ConfigError(self._failure)
        with failing():
            while True:
                wanted = self._wanted[shard]
                try:
                    return ObjectFolder(wanted.url.parent).read_version(wanted.url.name, wanted.about, start, end)
                except ObjectChanged:
                    self._renew(shard)

    def heal(self, shard: str) -> None:
        """Replaces the copy of a shard that turned out to be damaged, in the background."""
        wanted = self._wanted[shard]
        warn(f"{self.cache.path(wanted)} is damaged, and is copied again from {shard}")
        with contextlib.suppress(OSError):
            self.cache.discard(wanted)
        self.begin_copying([shard])

    def fail(self, message: str) -> None:
        """Makes every further read directly from the bucket raise a `ConfigError`: the set is not what it was."""
        if self._failure is None:
            self._failure = message
            warn(message)

    def copies(self) -> Copies:
        """Which copies there are, and how much room for more."""
        missing = [shard for shard in self._wanted if self.copy(shard) is None]
        room = self.cache.room
        size = sum(self._wanted[shard].about.size for shard in missing)
        return Copies(room.folder, len(self), len(missing), size, room.free_bytes(), room.limit_bytes)

    def begin_copying(self, order: Iterable[str]) -> Callable[[], None]:
        """Begins to copy all shards in the background, those first that `order` names first; returns a function that
        ends it."""
        if self.cache.room.limit_bytes == 0:
            return lambda: None
        with contextlib.suppress(OSError):  # reported by the threads
            self.cache.claim(self._wanted.values())
        copying = Copying(self, order)
        copying.start()
        return copying.stop

    def say_missing(self) -> None:
        """Reports how many shards are to be copied, if any."""
        with contextlib.suppress(OSError):  # reported when copying
            found = self.copies()
            if found.num_missing and found.limit_bytes != 0:
                warn(
                    f"{found.num_missing} of {found.num_files} shards ({human_size(found.missing_bytes)}) are copied "
                    f"from {self._places()} to {found.folder} in the background; until then they are read from the "
                    "bucket, which is slower"
                )

    def _places(self) -> str:
        return ", ".join(dict.fromkeys(str(one.url.parent) for one in self._wanted.values()))

    def fetch(self, shard: str) -> Outcome:
        """Makes the copy of a shard, if there is none.

        Raises:
          ConfigError: the shard has been replaced, or is not what is known of it.
          OSError: the store or the disk failed.
        """
        with failing():
            while True:
                try:
                    return self.cache.fetch(self._wanted[shard])
                except ObjectChanged:
                    self._renew(shard)

    def _renew(self, shard: str) -> None:
        """Takes the present version of an object that was replaced, if it has the same content.

        Raises:
          ConfigError: it has not.
        """
        wanted = self._wanted[shard]
        try:
            now = ObjectFolder(wanted.url.parent).object(wanted.url.name)
        except FileNotFoundError:
            raise ConfigError(f"{shard} has been deleted since it was opened: put it back") from None
        if not now.has_content_of(wanted.about):
            raise ConfigError(
                f"{shard} has been replaced since it was opened ({wanted.about.size} bytes, {wanted.about.checksum} -> "
                f"{now.size} bytes, {now.checksum}): the set has changed; put the same file back"
            )
        self._wanted[shard] = Wanted(wanted.url, now, wanted.blake2b)

    def no_room(self) -> str:
        """Says why there is no room for a copy, and what to do."""
        limit = self.cache.room.limit_bytes
        bound = "" if limit is None else f" of the {human_size(limit)} that data.source.cache_gib allows"
        free = human_size(max(0, self.cache.room.free_bytes()))
        return (
            f"there is no room for it in {self.cache.folder} ({free}{bound} are free, without a reserve for other "
            "files): make room, or give another folder by --data.source.cache-dir"
            + ("" if limit is None else ", or a larger --data.source.cache-gib")
        )
