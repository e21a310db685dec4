"""What the sources of sets in shards, Parquet files and tar files, have in common: files, splits, classes, index."""

import abc
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.bucket_shards import BucketShards
from nfnet_flax.data.buckets import listing
from nfnet_flax.data.cached_source import CachedSource
from nfnet_flax.data.index_store import IndexStore, Maker
from nfnet_flax.data.packed_images import Kind, PackedImages, Reader, Shard
from nfnet_flax.data.random_access import SourceConfig, Split, Unused
from nfnet_flax.data.shard_files import ShardKind, find_shards, folder_of, read_bytes, shard_size, shards_in
from nfnet_flax.data.shard_index import ShardIndex
from nfnet_flax.paths import check_path, check_place, local_path
from nfnet_flax.storage import bucket_url
from nfnet_flax.storage.cache import Wanted
from nfnet_flax.storage.url import is_url
from nfnet_flax.units import shown

_ENDS_BYTES = 1 << 16
"""Number of bytes at both ends of two files by which files of the same size are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSource(CachedSource, abc.ABC):
    """A set whose images lie in shards."""

    place_fields: ClassVar[tuple[str, ...]] = (
        *("root", "train", "eval", "class_names_file", "cache", "keep_index"),
        *CachedSource.place_fields,
    )
    kind: ClassVar[Kind]
    """How examples are named."""
    shard_kind: ClassVar[ShardKind]
    """Which files are shards."""

    root: str
    """Folder of the files: a path, where `~` is the home folder, or a URL such as `gs://BUCKET/FOLDER` (`s3://`)."""
    train: tuple[str, ...] = ("train",)
    """Training files: the name of the split (files in `root` or `root/data` whose names contain it as a word, or all
    files of a folder of that name), a folder (`.` is `root` itself), files, or patterns with `*` or `{0000..1023}`."""
    eval: tuple[str, ...] = ("validation",)
    """Files of the held-out images, as for `train`."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of the labels; empty: those that the set has."""
    class_names_file: str | None = None
    """Text file with a class name on each line, in place of `class_names`."""
    cache: str | None = None
    """Folder for the index of the images; None: a hidden folder beside the files, or, where that cannot be written and
    for a bucket, a folder in `~/.cache/nfnet_flax`."""
    keep_index: bool = True
    """Whether the index is written. Without it, it is made at each start, and nothing is copied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "eval"):
            value = getattr(self, name)
            require(bool(value), f"source.{name}", value, "give at least the name of a split, a file or a pattern")
            for entry in value:
                check_place(f"source.{name}", entry)
        check_place("source.root", self.root)
        for name in ("class_names_file", "cache"):
            if (value := getattr(self, name)) is not None:
                check_path(f"source.{name}", value)
        is_known = len(set(self.class_names)) == len(self.class_names) and "" not in self.class_names
        require(is_known, "source.class_names", self.class_names, "must all be different, and not empty")
        remedy = "give source.class_names or this, not both"
        require(
            not (self.class_names and self.class_names_file), "source.class_names_file", self.class_names_file, remedy
        )

    @abc.abstractmethod
    def maker(self) -> Maker:
        """Makes the indexes."""

    @abc.abstractmethod
    def reader(self, shard: str, index: ShardIndex) -> Reader:
        """Reads the images of a shard."""

    def own_names(self, shards: Sequence[str], indexes: Sequence[ShardIndex]) -> tuple[str, ...] | None:
        """Class names that the shards themselves list, in the order of the labels; by default None.

        Raises:
          ConfigError: the shards do not fit together.
        """
        del shards, indexes
        return None

    def known_contents(self, indexes: Sequence[ShardIndex]) -> str | None:
        """Digest of what is known about the contents of the shards; by default None: the sizes of the images."""
        del indexes
        return None

    def remarks(self, shards: Sequence[str], indexes: Sequence[ShardIndex]) -> list[Unused]:
        """What a user should know about the shards of a split besides what is not used; by default nothing.

        Raises:
          ConfigError: the shards do not fit together.
        """
        del shards, indexes
        return []

    def open(self, split: Split, image_size: int) -> PackedImages:
        del image_size  # encoded files of any size
        return self._opened(split, copies=True)

    def training_classes(self, image_size: int) -> tuple[str, ...]:
        del image_size
        return self._given_names() or self._opened("train", copies=False).class_names

    def with_absolute_places(self) -> Self:
        changes = {
            name: os.path.abspath(os.path.expanduser(value))
            for name in ("root", "class_names_file", "cache", "cache_dir")
            if (value := getattr(self, name)) is not None and not is_url(value)
        }
        return dataclasses.replace(self, **changes)

    def with_training_of(self, trained: SourceConfig) -> Self:
        if not isinstance(trained, PackedSource) or type(trained) is not type(self):
            return self
        entries = [entry if is_url(entry) else os.path.join(trained.root, entry) for entry in trained.train]
        return dataclasses.replace(self, train=tuple(entries))

    def without_writing(self) -> Self:
        return dataclasses.replace(self, keep_index=False)

    def shards(self, split: Split) -> list[str]:
        """The shards of a split, sorted.

        Raises:
          ConfigError: as for `find_shards`.
        """
        entries = self.train if split == "train" else self.eval
        root = bucket_url("source.root", self.root) or local_path("source.root", self.root)
        return find_shards(f"source.{split}", root, entries, self.shard_kind)

    def _in_bucket(self, shards: Sequence[str]) -> BucketShards | None:
        """The shards that are in a bucket. They can be read as long as the object lives."""
        urls = [url for shard in shards if (url := bucket_url("shard", shard)) is not None]
        objects = {folder: listing(folder)[0] for folder in {url.parent for url in urls}}
        if gone := [url for url in urls if url.name not in objects[url.parent]]:
            raise ConfigError(f"{gone[0]} was deleted while the set was opened: put it back")
        wanted = [Wanted(url, objects[url.parent][url.name]) for url in urls]
        return BucketShards(wanted, self.kept_copies()) if wanted else None

    def check_splits(self) -> None:
        try:
            train, held_out = self.shards("train"), self.shards("eval")
        except ConfigError:  # reported when that split is opened
            return
        in_bucket = self._in_bucket([*train, *held_out])  # is needed to read them
        shared = _shared(train, held_out)
        del in_bucket
        if shared:
            raise ConfigError(
                f"source.train = {self.train!r} and source.eval = {self.eval!r} share {len(shared)} files, such as "
                f"{shared[0]!r}: an evaluation on training images means nothing; give other files, or hold images out "
                "from the beginning of a run by --data.num-held-out"
            )

    def check_outside(self, field: str, place: Path) -> None:
        folders: set[Path] = set()
        splits: tuple[Split, ...] = ("train", "eval")
        for split in splits:
            with contextlib.suppress(ConfigError):  # reported when the split is opened
                folders |= {folder for shard in self.shards(split) if isinstance(folder := folder_of(shard), Path)}
        if place in folders:
            raise ConfigError(
                f"{field} = {str(place)!r}: is the folder of the {self.shard_kind.what}s: give another one"
            )

    def _given_names(self) -> tuple[str, ...]:
        if self.class_names_file is None:
            return self.class_names
        path = local_path("source.class_names_file", self.class_names_file)
        try:
            lines = path.read_bytes().decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"source.class_names_file = {self.class_names_file!r} cannot be read: {error}") from error
        names = tuple(line.strip() for line in lines if line.strip())
        remedy = "must have a class name on each line, each of them once"
        is_list = bool(names) and len(set(names)) == len(names)
        require(is_list, "source.class_names_file", self.class_names_file, remedy)
        return names

    def _opened(self, split: Split, *, copies: bool) -> PackedImages:
        try:
            shards = self.shards(split)
        except ConfigError as error:
            if split == "train":
                raise
            hint = "a run that has not begun can hold out training images by --data.num-held-out 1000"
            raise ConfigError(f"{error}; {hint}") from error
        in_bucket = self._in_bucket(shards)
        cache = None if self.cache is None else local_path("source.cache", self.cache)
        indexes = IndexStore(cache, self.keep_index, copies).indexes(shards, self.maker())
        own, given = self.own_names(shards, indexes), self._given_names()
        if own is not None and given and len(own) != len(given):
            raise ConfigError(
                f"source.class_names: {len(given)} names are given, and the files list {len(own)} classes "
                f"({shown(own)}): give as many, or none"
            )
        found = [Shard(name, index, self.reader(name, index)) for name, index in zip(shards, indexes, strict=True)]
        unused = [*self._other_files(split, shards), *_slow(indexes, copies), *self.remarks(shards, indexes)]
        return PackedImages(self.kind, found, given or own, unused, self.known_contents(indexes), in_bucket)

    def _other_files(self, split: Split, shards: Sequence[str]) -> list[Unused]:
        """The files in the folders of a split that no split reads."""
        used = set(shards)
        with contextlib.suppress(ConfigError):  # a split may be missing
            used |= set(self.shards("eval" if split == "train" else "train"))
        unused = []
        for folder in dict.fromkeys(map(folder_of, shards)):
            if other := [shard for shard in shards_in(folder, self.shard_kind) if shard not in used]:
                text = f"{folder}: not used are {len(other)} files of no split that is read, such as {other[0]!r}"
                unused.append(Unused(len(other), text))
        return unused


def _slow(indexes: Sequence[ShardIndex], copies: bool) -> list[Unused]:
    num_rows = sum(bool(index.facts.get("has_rows")) and not index.facts.get("copy") for index in indexes)
    if not copies or not num_rows:
        return []
    text = (
        f"the images of {num_rows} files are compressed and not copied: each takes as long as its row group; with "
        "source.keep_index they are copied, once"
    )
    return [Unused(0, text)]


def _shared(train: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """The shards of one split that are in the other one, under whatever name."""
    places = {os.path.realpath(shard) for shard in held_out}
    if same := [shard for shard in train if os.path.realpath(shard) in places]:
        return same
    sizes: dict[int, list[str]] = {}
    for shard in held_out:
        sizes.setdefault(shard_size(shard), []).append(shard)
    return [
        shard
        for shard in train
        if (like := sizes.get(shard_size(shard))) and _ends(shard) in {_ends(other) for other in like}
    ]


def _ends(shard: str) -> bytes:
    end = max(0, shard_size(shard) - _ENDS_BYTES)
    return hashlib.blake2b(read_bytes(shard, 0, _ENDS_BYTES) + read_bytes(shard, end, _ENDS_BYTES)).digest()
