"""A split whose images lie in the shards of Parquet files or tar files, as a source of examples."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.ahead import Ahead
from nfnet_flax.data.bucket_shards import BucketShards
from nfnet_flax.data.random_access import Copies, Record, Unused, check_index, digest, fixed_order
from nfnet_flax.data.shard_files import read_bytes
from nfnet_flax.data.shard_index import ShardIndex
from nfnet_flax.storage.url import is_url
from nfnet_flax.units import shown

_MAX_CLASSES = 2**20
"""Largest number of classes without names: numbers beyond are no numbers of classes."""


class Reader(Protocol):
    """Reads the images of one shard; picklable."""

    def read(self, offset: int, size: int) -> bytes:
        """The image at an offset of the index; fewer bytes than `size` if the file ends before.

        Raises:
          CorruptRecordError: the file can be read, and what is stored there is damaged.
          OSError: it cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class PlainBytes:
    """Images that lie in a file as they are."""

    file: str
    """The shard, or a local file."""

    def read(self, offset: int, size: int) -> bytes:
        return read_bytes(self.file, offset, size)


@dataclasses.dataclass(frozen=True)
class BucketBytes:
    """Images that lie in a file of a bucket as they are."""

    shard: str
    """The URL of the file."""
    shards: BucketShards
    """The set that it is in."""

    def read(self, offset: int, size: int) -> bytes:
        return self.shards.read(self.shard, offset, min(offset + size, self.shards.size(self.shard)))


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a split."""

    name: str
    index: ShardIndex
    reader: Reader


class Kind(NamedTuple):
    """How the examples of a kind of set are named."""

    name: str
    """Name of the kind, for fingerprints."""
    unit: Literal["row", "member"]
    """What an example is in its shard."""

    def place(self, shard: str, number: int, name: bytes) -> str:
        """Names an example in messages."""
        text = name.decode(errors="surrogateescape")
        if self.unit == "member":
            return f"{shard} member {text}"
        return f"{shard} row {number}" + (f" ({text})" if text else "")


class PackedImages:
    """A split in shards; images stay encoded. The order is that of a folder with the same images: `fixed_order`."""

    def __init__(
        self,
        kind: Kind,
        shards: Sequence[Shard],
        class_names: Sequence[str] | None,
        unused: Sequence[Unused],
        contents: str | None,
        in_bucket: BucketShards | None = None,
    ) -> None:
        """Joins the indexes of the shards.

        Args:
          kind: what names the examples.
          shards: the shards, in their order.
          class_names: names of the classes, in the order of the labels; None: those that occur, sorted, or the numbers.
          unused: what is not used besides what the indexes say.
          contents: digest of what is known about the contents; None: of the sizes of the images.
          in_bucket: the shards, if they are in a bucket.

        Raises:
          ConfigError: there are no examples, or a label has no class.
        """
        if not sum(len(shard.index) for shard in shards):
            names = shown([shard.name for shard in shards])
            raise ConfigError(f"{names}: has no image in it: give files with images{_because(shards)}")
        self._kind, self._shards = kind, tuple(shard.name for shard in shards)
        self._readers = tuple(shard.reader for shard in shards)
        self._ahead = Ahead()
        self._in_bucket: BucketShards | None = None
        self._is_remote = [is_url(shard.name) and _reads(shard.reader, shard.name) for shard in shards]
        if in_bucket is not None and any(self._is_remote):
            self._in_bucket = in_bucket.part(itertools.compress(self._shards, self._is_remote))
            self._readers = tuple(_from_bucket(reader, self._in_bucket) for reader in self._readers)
        self.class_names, labels = _classes(kind, shards, class_names)
        joined = {
            name: np.concatenate([getattr(shard.index, name) for shard in shards])
            for name in ("names", "offsets", "sizes")
        }
        file_names = _file_names(joined["names"])
        order = fixed_order(self.class_names, file_names, labels)
        self._labels = labels[order]
        self._names, self._offsets, self._sizes = (joined[name][order] for name in ("names", "offsets", "sizes"))
        counts = [len(shard.index) for shard in shards]
        self._shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), counts)[order]
        self._number = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[order]
        self.unused = (*unused, *_unused(shards))
        ordered = file_names[order]
        self._fingerprint = digest(
            kind.name, *self.class_names, str(ordered.dtype), ordered.tobytes(), self._labels.tobytes()
        )
        self._contents = digest("sizes", self._sizes.tobytes()) if contents is None else contents

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, len(self))
        size = int(self._sizes[index])
        future = self._ahead.take(index)
        image = self._read(index) if future is None else future.result()
        if len(image) < size:
            raise ConfigError(
                f"{self.describe(index)} has {len(image)} bytes, not {size}: the file was cut off or replaced since "
                "this start: copy it again, and start again"
            )
        return {"image": image, "label": self._labels[index]}

    def _read(self, index: int) -> bytes:
        return self._readers[self._shard_of[index]].read(int(self._offsets[index]), int(self._sizes[index]))

    def read_ahead(self, indexes: Iterable[int]) -> None:
        """See `Prepares`."""
        if self._in_bucket is None:
            return
        for index in indexes:
            shard = self._shard_of[index]
            if self._is_remote[shard] and self._in_bucket.copy(self._shards[shard]) is None:
                self._ahead.begin(index, self._read, index)

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]:
        """See `Prepares`."""
        if self._in_bucket is None:
            return lambda: None
        self._in_bucket.say_missing()
        shards = (self._shard_of[index] for index in order)
        stop = self._in_bucket.begin_copying(self._shards[shard] for shard in shards if self._is_remote[shard])

        def end() -> None:
            stop()
            self._ahead.clear()

        return end

    def copies(self) -> Copies | None:
        """See `Prepares`."""
        return None if self._in_bucket is None else self._in_bucket.copies()

    def fingerprint(self) -> str:
        """Digest of the classes, and of the names, labels and order of the images."""
        return self._fingerprint

    def contents(self) -> str:
        """Digest of the sizes of the images, or for Parquet of the metadata of the files."""
        return self._contents

    def describe(self, index: int) -> str:
        index = check_index(index, len(self))
        shard = self._shards[self._shard_of[index]]
        return self._kind.place(shard, int(self._number[index]), bytes(self._names[index]))

    def places(self) -> tuple[tuple[Reader, ...], np.ndarray, np.ndarray, np.ndarray]:
        """Readers, and for each example the number of its reader (N,) int32, its offset (N,) int64, and its size (N,)
        int64."""
        return self._readers, self._shard_of, self._offsets, self._sizes

    def named_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """For each example its file name without folders, (N,) bytes, and its label, (N,) int32. An image without a
        name has the number of its row in the split."""
        counts = np.bincount(self._shard_of, minlength=len(self._shards))
        starts = np.cumsum(counts) - counts
        return _file_names(self._names, starts[self._shard_of] + self._number), self._labels


def _reads(reader: Reader, shard: str) -> bool:
    """Whether the images of a shard are read from the shard, and not from a copy of them."""
    return not isinstance(reader, PlainBytes) or reader.file == shard


def _from_bucket(reader: Reader, shards: BucketShards) -> Reader:
    return BucketBytes(reader.file, shards) if isinstance(reader, PlainBytes) and is_url(reader.file) else reader


def _file_names(names: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """(N,) bytes: names without folders; images without a name get their number, by default their position."""
    numbers = np.arange(len(names)) if numbers is None else numbers
    without = [
        name.rpartition(b"/")[2] or b"%08d" % number
        for name, number in zip(names.tolist(), numbers.tolist(), strict=True)
    ]
    return np.array(without, dtype=bytes)


def _classes(
    kind: Kind, shards: Sequence[Shard], class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the classes, and the label of each example (N,) int32, in the order in which they are stored."""
    if all(shard.index.label_names is None for shard in shards):
        return _numbered(kind, shards, class_names)
    names_of = [
        tuple(map(str, shard.index.labels.tolist())) if shard.index.label_names is None else shard.index.label_names
        for shard in shards
    ]
    known = tuple(sorted({name for names in names_of for name in names})) if class_names is None else class_names
    label_of = {name: label for label, name in enumerate(known)}
    labels = []
    for shard, names in zip(shards, names_of, strict=True):
        own = shard.index.labels if shard.index.label_names is not None else np.arange(len(names))
        table = np.array([label_of.get(name, -1) for name in names], np.int32)
        of_shard = table[own]
        if np.any(of_shard < 0):
            number = int(np.argmax(of_shard < 0))
            place = kind.place(shard.name, number, bytes(shard.index.names[number]))
            raise ConfigError(
                f"{place}: class {names[own[number]]!r} is none of source.class_names: {shown(tuple(known))}: correct "
                "the label, or add the class"
            )
        labels.append(of_shard)
    return tuple(known), np.concatenate(labels)


def _numbered(
    kind: Kind, shards: Sequence[Shard], class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """The same for labels that are numbers."""
    num_classes = _MAX_CLASSES if class_names is None else len(class_names)
    for shard in shards:
        wrong = (shard.index.labels < 0) | (shard.index.labels >= num_classes)
        if np.any(wrong):
            number = int(np.argmax(wrong))
            label = int(shard.index.labels[number])
            remedy = "give files with labels" if label < 0 else "give all class names by --data.source.class-names-file"
            place = kind.place(shard.name, number, bytes(shard.index.names[number]))
            raise ConfigError(
                f"{place}: label {label} is the number of no class, from 0 to {num_classes - 1} "
                f"({int(np.sum(wrong))} such labels in this file): {remedy}"
            )
    labels = np.concatenate([shard.index.labels for shard in shards]).astype(np.int32)
    names = tuple(map(str, range(int(labels.max()) + 1))) if class_names is None else tuple(class_names)
    return names, labels


def _unused(shards: Sequence[Shard]) -> list[Unused]:
    counts: dict[str, tuple[int, str]] = {}
    for shard in shards:
        for found in shard.index.unused:
            count, example = counts.get(found.reason, (0, f"{found.example} in {shard.name}"))
            counts[found.reason] = (count + found.num, example)
    return [
        Unused(count, f"not used are {count} {reason}, such as {example}")
        for reason, (count, example) in sorted(counts.items())
    ]


def _because(shards: Sequence[Shard]) -> str:
    """What is in shards without images, for a message."""
    return "".join(f"; {found.text}" for found in _unused(shards))
