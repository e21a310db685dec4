"""The interface of a set of labelled images and of its configuration, and code that several sources share.

To add a source, derive a frozen dataclass from `SourceConfig`. Its `open` returns a `Source`: an `ArraySource` if all
images fit into memory, or an object of a class of your own.
"""

import abc
import dataclasses
import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from nfnet_flax.config import require
from nfnet_flax.data.augment_config import AffineAugment, CropAugment
from nfnet_flax.open_config import OpenConfig
from nfnet_flax.progress import tracking
from nfnet_flax.units import human_size

Split = Literal["train", "eval"]
Record = dict[str, Any]
"""`image`: bytes of an encoded file, or a (H, W, 3) uint8 array; `label`: an np.int32 scalar, or with
`SourceConfig.is_multi_label` a (number of classes,) uint8 array of zeros and ones."""

_HASHED_AT_ONCE = 10_000


class Unused(NamedTuple):
    """Files in a set of images, or rows or members of them, that are not used, all for the same reason."""

    num_files: int
    """Their number; 0: the text says something else about the set that its user should know."""
    text: str
    """A sentence with the number, the reason and an example."""


class CorruptRecordError(ValueError):
    """The stored bytes of one example cannot be read or fail their checksum. The message names file and record."""


@runtime_checkable
class Source(Protocol):
    """A set of examples with random access. It must be picklable: files are opened in the process that reads them."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label, in the order of the labels."""

    @property
    def unused(self) -> tuple[Unused, ...]:
        """Files in the set that are not used, one entry for each reason. Commands and `train` report them."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Record:
        """One example.

        Raises:
          IndexError: `index` is negative or not below `len(self)`.
          CorruptRecordError: the container's checksums show that the example's bytes are damaged. (The decoder finds
            out whether they are an image.)
          ConfigError: the record contradicts the set that it was found in.
          OSError: the file cannot be opened or read. Examples are never skipped for this reason.
        """

    def fingerprint(self) -> str:
        """Hexadecimal digest that identifies the set, independent of its path. Sets are the same images if both this
        and `contents` are equal.

        It covers the class names, which examples there are, their labels and their order. It also covers the contents
        as far as they are known without reading every image:

        - a folder: the name of every file; its size is part of `contents`. A file that was replaced by another one of
          the same size is not noticed.
        - ArrayRecord: the BLAKE2b of every shard, as the manifest recorded it; when the shards are opened, they are
          compared with their manifest.
        - tar files: the name of every image; its size is part of `contents`. Parquet files: the name of every image, or
          the number of its row; the metadata of the files (sizes and statistics of all columns) are part of `contents`.
        - TFDS: name, version and size of the set as TFDS recorded them; name and size of each file, and which of its
          records are read.
        - digits and noise: the pixels, or the values from which they are computed.
        """

    def contents(self) -> str:
        """Hexadecimal digest of what is known about the contents in addition to `fingerprint`; empty if nothing is.

        It is separate because it may change during a run: a damaged file is repaired, and the run continues.
        """

    def describe(self, index: int) -> str:
        """Names the file, or the shard and record, of an example."""


@runtime_checkable
class Prepares(Protocol):
    """What a source may have in addition, if reading an example means waiting for a network."""

    def read_ahead(self, indexes: Iterable[int]) -> None:
        """Begins to read examples. Each of them is asked for once, soon. Errors are raised then."""

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]:
        """Begins to copy files to this machine in the background, and returns a function that ends this at once.

        Args:
          order: indexes of the examples, in the order in which they will be asked for. It may be long.
        """

    def copies(self) -> "Copies | None":
        """Which copies there are; None if none are needed."""


class Copies(NamedTuple):
    """Copies of the files of a set on this machine."""

    folder: Path
    """Where they are."""
    num_files: int
    """Number of files of the set."""
    num_missing: int
    """Number of files of which there is no copy."""
    missing_bytes: int
    """Size of these."""
    free_bytes: int
    """Room that there is for more."""
    limit_bytes: int | None
    """Room that the user allows; None: all that the disk has."""


def read_ahead(source: Source, indexes: Iterable[int]) -> None:
    """`Prepares.read_ahead`, if the source has it."""
    if isinstance(source, Prepares):
        source.read_ahead(indexes)


def begin_copying(source: Source, order: Iterable[int]) -> Callable[[], None]:
    """`Prepares.begin_copying`, if the source has it."""
    return source.begin_copying(order) if isinstance(source, Prepares) else lambda: None


def copies_of(source: Source) -> Copies | None:
    """`Prepares.copies`, if the source has it."""
    return source.copies() if isinstance(source, Prepares) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(OpenConfig, abc.ABC):
    """Where labelled images come from.

    `place_fields` are the fields that say where the images and copies of them are; the images themselves are compared
    by `Source.fingerprint`. A recipe can be read on a machine without the images, so libraries that read them are best
    imported in the methods that need them.
    """

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several classes, or none. The label of an example is then a row of zeros and ones
        with one number for each class. By default False: it is the number of the image's class."""
        return False

    @abc.abstractmethod
    def open(self, split: Split, image_size: int) -> Source:
        """The examples of a split, with the classes that it has. Callers use `open_source`, which converts the labels
        of both splits to the run's classes.

        Args:
          split: which split.
          image_size: height and width of the network's images, in pixels. Images may have any size; images that are
            generated, such as noise, can be generated at this size.

        Raises:
          ConfigError: the images are missing or incomplete; the message says how to get them.
          OSError: the disk or the network failed.
        """

    def training_classes(self, image_size: int) -> Sequence[str]:
        """Names of the classes of the training split. By default the split is opened to read them, with the errors of
        `open`."""
        return self.open("train", image_size).class_names

    def default_augment(self) -> AffineAugment | CropAugment:
        """The augmentation of training images if `data.augment` is None; by default the one for photos."""
        return CropAugment()

    def with_training_of(self, trained: "SourceConfig") -> Self:
        """This source with the training split that a run has trained on, if the source can name that split; by default
        the source unchanged."""
        del trained
        return self

    def without_writing(self) -> Self:
        """This source in a form that writes nothing when it is opened, not even an index that would be kept, though
        that may take longer; by default the source unchanged."""
        return self

    def check_splits(self) -> None:
        """Raises ConfigError if the held-out split contains examples of the training split, as far as this is known
        without reading them. (Two equal splits are always noticed, by their fingerprints.)"""

    def check_outside(self, field: str, place: Path) -> None:
        """Raises ConfigError if a folder that is to be written lies within a split and would be read as a part of it.

        Args:
          field: name of the folder in the message.
          place: the folder, as `local_path` gives it.
        """

    def num_open_files(self) -> int:
        """Number of files of both splits that stay open while examples are read; by default 0, which means only a
        few."""
        return 0


def check_index(index: int, length: int) -> int:
    """`index` as an int; raises IndexError outside `[0, length)`, as a negative index would hide an error."""
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"index {index} of a set of {length} examples")
    return index


def check_memory(field: str, value: object, num_bytes: int, what: str) -> None:
    """Raises `ConfigError` if something would take more than all memory of this machine.

    Args:
      field: name of the field that determines the amount, for the message.
      value: value of that field.
      num_bytes: number of bytes that are needed.
      what: what needs them, in the plural, for the message.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    remedy = f"{what} take {human_size(num_bytes)}, and this machine has {human_size(memory)}: give less"
    require(num_bytes <= memory, field, value, remedy)


def digest(*parts: str | bytes) -> str:
    """Hexadecimal BLAKE2b of the parts; the same text divided into other parts has another digest."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def fixed_order(class_names: Sequence[str], file_names: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The order of the examples of a folder and of the set prepared from it: by a hash of `class_name/file_name`.

    If a split were sorted by class, its first 10,000 images, which are held out while tuning, would be of few classes.
    The hash mixes the classes, and depends neither on a random generator's version nor on how the files were found.

    Args:
      class_names: names of the classes, in the order of the labels.
      file_names: (N,) bytes, without folder.
      labels: (N,) int32.

    Returns:
      (N,) int64 permutation.
    """
    by_name = np.lexsort((file_names, labels))  # makes equal hashes, should there ever be any, deterministic
    prefixes = [name.encode(errors="surrogateescape") + b"/" for name in class_names]

    def hashes(part: np.ndarray) -> bytes:
        named = zip(labels[part].tolist(), file_names[part].tolist(), strict=True)
        return b"".join(hashlib.blake2b(prefixes[label] + name, digest_size=8).digest() for label, name in named)

    with tracking("fingerprint and order of the images", len(labels), "images") as task:
        found = []
        for start in range(0, len(labels), _HASHED_AT_ONCE):
            part = by_name[start : start + _HASHED_AT_ONCE]
            found.append(hashes(part))
            task.advance(len(part))
    return by_name[np.argsort(np.frombuffer(b"".join(found), ">u8"), kind="stable")]


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images and labels in memory; the classes are named by their numbers, unless names are given."""

    images: np.ndarray
    """(N, H, W, 3) uint8."""
    labels: np.ndarray
    """(N,) int32."""
    names: tuple[str, ...] = ()
    """Names of the classes, in the order of the labels; empty: "0", "1" and so on."""
    unused: tuple[Unused, ...] = ()
    """Files that are not used: none."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names or tuple(map(str, range(self.labels.max() + 1)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Record:
        index = check_index(index, len(self))
        return {"image": self.images[index], "label": self.labels[index]}

    def fingerprint(self) -> str:
        return digest("arrays", *self.names, str(self.images.shape), self.images.tobytes(), self.labels.tobytes())

    def contents(self) -> str:
        return ""

    def describe(self, index: int) -> str:
        return f"image {check_index(index, len(self))} of {len(self)} in memory"


@dataclasses.dataclass(frozen=True)
class SourceSlice:
    """Consecutive examples of another source. Made by `split_off`, which checks the bounds."""

    source: Source
    """The other source, with all examples."""
    start: int
    """Index of the first one."""
    stop: int
    """Index after the last one."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def unused(self) -> tuple[Unused, ...]:
        return self.source.unused

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Record:
        return self.source[self.start + check_index(index, len(self))]

    def fingerprint(self) -> str:
        return digest(self.source.fingerprint(), f"{self.start}:{self.stop}")

    def contents(self) -> str:
        return self.source.contents()

    def describe(self, index: int) -> str:
        return self.source.describe(self.start + check_index(index, len(self)))

    def read_ahead(self, indexes: Iterable[int]) -> None:
        """See `Prepares`."""
        read_ahead(self.source, (self.start + index for index in indexes))

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]:
        """See `Prepares`."""
        return begin_copying(self.source, (self.start + index for index in order))

    def copies(self) -> Copies | None:
        """See `Prepares`."""
        return copies_of(self.source)


def split_off(source: Source, start: int, stop: int) -> Source:
    """The examples `start` to `stop - 1` of a source, as a source.

    With the first N held out, `split_off(source, 0, N)` evaluates and `split_off(source, N, len(source))` trains.

    Raises:
      ConfigError: the bounds leave nothing or lie outside the source.
    """
    remedy = f"must be a non-empty range within the {len(source)} examples"
    require(0 <= start < stop <= len(source), "examples", f"{start}:{stop}", remedy)
    return SourceSlice(source, start, stop)
