"""The records of ArrayRecord files in buckets: from copies on this machine, or directly."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.ahead import Ahead
from nfnet_flax.data.array_records import ENDS_BYTES, Shard, decode_record
from nfnet_flax.data.bucket_shards import BucketShards
from nfnet_flax.data.buckets import listing
from nfnet_flax.data.random_access import Copies, CorruptRecordError
from nfnet_flax.data.record_files import open_records, read_record
from nfnet_flax.data.record_index import read_index, record_of
from nfnet_flax.progress import track
from nfnet_flax.storage import BucketUrl
from nfnet_flax.storage.cache import ObjectCache, Wanted

_NUM_OPEN_THREADS = 16


class BucketRecords:
    """Random access to the records of shards, each named by shard and number."""

    def __init__(self, found: Sequence[tuple[BucketUrl, Shard]], cache: ObjectCache) -> None:
        """Lists the shards, and compares their sizes and ends with the manifest.

        Args:
          found: the shards and what their manifest says.
          cache: where copies are kept.

        Raises:
          ConfigError: a shard is missing, or is not what its manifest describes.
          OSError: the store failed.
        """
        objects = {folder: listing(folder)[0] for folder in {url.parent for url, _ in found}}
        wanted = []
        for url, shard in found:
            about = objects[url.parent].get(url.name)
            if about is None or about.size != shard.num_bytes:
                size = "is not there" if about is None else f"has {about.size} bytes, not the {shard.num_bytes} written"
                raise ConfigError(f"{url} {size}: copy it again, or prepare the set again")
            wanted.append(Wanted(url, about, shard.blake2b))
        self.shards = BucketShards(wanted, cache)
        self._names = [str(url) for url, _ in found]
        self._about = [shard for _, shard in found]
        self._positions: dict[int, np.ndarray] = {}
        self._ahead = Ahead()
        self._begin()
        with ThreadPoolExecutor(_NUM_OPEN_THREADS) as threads:
            checked = threads.map(self._check, range(len(found)))
            list(track(checked, f"checking the files in {found[0][0].parent}", "files", len(found)))

    def _begin(self) -> None:
        self._files: dict[int, Any] = {}
        self._healed = set[int]()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_files", "_healed", "_lock")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def read(self, shard: int, number: int) -> bytes:
        """A record, whose checksum has been compared.

        Args:
          shard: number of the shard.
          number: number of the record in it.

        Raises:
          CorruptRecordError: the store's bytes are damaged.
          ConfigError: the shard has been replaced.
          OSError: the store failed.
        """
        if (future := self._ahead.take((shard, number))) is not None:
            return future.result()
        if (path := self.shards.copy(self._names[shard])) is not None:
            file = self._opened(shard, path)
            try:
                return read_record(file, number, str(path))
            except CorruptRecordError:
                self._heal(shard, file)
            except OSError:  # it was deleted meanwhile, or the disk failed
                self._files.pop(shard, None)
        return self._read_directly(shard, number)

    def read_ahead(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Begins to read records of shards without a copy. Each of them is to be read once then."""
        for shard, number in wanted:
            if self.shards.copy(self._names[shard]) is None:
                self._ahead.begin((shard, number), self._read_directly, shard, number)

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]:
        """Begins to copy the shards in the background, in the order of the given numbers of shards; returns a function
        that ends this and what `read_ahead` began."""
        self.shards.say_missing()
        stop = self.shards.begin_copying(self._names[shard] for shard in order)

        def end() -> None:
            stop()
            self._ahead.clear()

        return end

    def copies(self) -> Copies:
        """Which copies there are."""
        return self.shards.copies()

    def _opened(self, shard: int, path: Path) -> Any:
        """Random access to the records of a copy, which stays open."""
        files = self._files.get(shard)
        if files is None:
            files = self._files[shard] = open_records({str(path): self._about[shard].num_records})
        return files

    def _heal(self, shard: int, file: Any) -> None:
        """Replaces a damaged copy, unless another thread has done so."""
        with self._lock:
            is_first = self._files.get(shard) is file and shard not in self._healed
            self._files.pop(shard, None)
            self._healed.add(shard)
        if is_first:
            self.shards.heal(self._names[shard])

    def _read_directly(self, shard: int, number: int) -> bytes:
        positions = self._index(shard)
        start, end = int(positions[number]), int(positions[number + 1])
        for is_last in (False, True):
            try:
                record = record_of(self.shards.read_directly(self._names[shard], start, end), start)
                decode_record(record, check=True)
                return record
            except CorruptRecordError:  # perhaps on its way
                if is_last:
                    raise
        raise AssertionError

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._positions:
            name, about = self._names[shard], self._about[shard]

            def read(start: int, end: int) -> bytes:
                return self.shards.read_directly(name, start, end)

            self._positions[shard] = read_index(read, about.num_bytes, about.num_records)
        return self._positions[shard]

    def _check(self, shard: int) -> None:
        """Checks that a shard is the one that its manifest describes, as far as possible without reading all of it."""
        name, about = self._names[shard], self._about[shard]
        if self.shards.copy(name) is not None:
            return  # it was compared with the BLAKE2b of the manifest
        read = dict[int, bytes]()

        def remember(start: int, end: int) -> bytes:
            read[end] = self.shards.read_directly(name, start, end)
            return read[end]

        try:
            self._positions[shard] = read_index(remember, about.num_bytes, about.num_records)
        except CorruptRecordError as error:
            raise ConfigError(f"{name} is damaged ({error}): copy it again, or prepare the set again") from error
        first = self.shards.read_directly(name, 0, ENDS_BYTES)
        found = hashlib.blake2b(first + read[about.num_bytes][-ENDS_BYTES:]).hexdigest()
        if about.ends_blake2b not in (None, found):
            raise ConfigError(
                f"{name} is not the file that the manifest beside it describes (its beginning or its end differs): "
                "it was changed, or belongs to another set; copy it again, or prepare the set again"
            )
