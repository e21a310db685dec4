"""A set of images in ArrayRecord files as a source of examples."""

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, ClassVar, Protocol, Self

import numpy as np

from nfnet_flax.config import ConfigError, Shown, require
from nfnet_flax.data.array_records import (
    Manifest,
    Shard,
    contradiction,
    decode_record,
    described,
    ends_digest,
    find_shards,
    is_pattern,
    manifest_name,
    read_manifest,
    split_of,
)
from nfnet_flax.data.buckets import Place, in_order
from nfnet_flax.data.cached_source import CachedSource
from nfnet_flax.data.random_access import (
    Copies,
    CorruptRecordError,
    Record,
    SourceConfig,
    Split,
    Unused,
    check_index,
    digest,
)
from nfnet_flax.paths import check_place
from nfnet_flax.progress import track
from nfnet_flax.storage import BucketUrl

# Reading the ends of a file means waiting for the disk or the network, so many are read at once.
_NUM_OPEN_THREADS = 16
_Found = list[tuple[Place, Shard]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordSource(CachedSource):
    """ArrayRecord files written by `tools/prepare_imagenet.py`, with `train.json` or `eval.json` in the same folder, on
    a disk of this machine or in a bucket."""

    place_fields: ClassVar[tuple[str, ...]] = ("train", "eval", *CachedSource.place_fields)

    train: tuple[Annotated[str, Shown("FILE|PATTERN")], ...]
    """Files of the training split, or shell-style patterns such as `data/train-*.array_record` or
    `gs://BUCKET/FOLDER/train-*` (`s3://`). The files are read in the order of their sorted paths. A pattern must find
    every shard of the set that it describes, and both splits together must use all shards of that set. Files that are
    listed one by one may be a part of the set; a warning then says which part is missing. `~` is the home folder; a
    folder whose name contains `[`, `]`, `*` or `?` is given as it is."""
    eval: tuple[Annotated[str, Shown("FILE|PATTERN")], ...]
    """Files or patterns of the held-out split, as for `train`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("train", self.train), ("eval", self.eval)):
            require(bool(value), f"source.{name}", value, "give at least one file or pattern")
            for pattern in value:
                check_place(f"source.{name}", pattern)

    def open(self, split: Split, image_size: int) -> "ArrayRecords":
        del image_size  # encoded files of any size
        return ArrayRecords(self, split)

    def training_classes(self, image_size: int) -> tuple[str, ...]:
        del image_size
        return _listed(self, "train")[0]

    def with_training_of(self, trained: SourceConfig) -> Self:
        if not isinstance(trained, ArrayRecordSource):
            return self
        return dataclasses.replace(self, train=trained.train)

    def check_splits(self) -> None:
        _check_apart(self)

    def num_open_files(self) -> int:
        with contextlib.suppress(ConfigError):  # reported when the split is opened
            return len(find_shards(self.train, "source.train")) + len(find_shards(self.eval, "source.eval"))
        return 0


class ArrayRecords:
    """A split, or some shards of one, prepared by `tools/prepare_imagenet.py`; images stay encoded."""

    def __init__(self, config: ArrayRecordSource, split: Split) -> None:
        """Reads the manifest, and compares the sizes and ends of the files with it.

        Args:
          config: which files.
          split: which split of them.

        Raises:
          ConfigError: as for `find_shards` and `read_manifest`; patterns leave out shards of a set; files differ from
            their manifest or in their classes; the training split contains shards of a held-out set; or some files are
            in a bucket and others are not.
          OSError: a file cannot be read, or the store failed.
        """
        self.class_names, found = _listed(config, split)
        self.unused = _left_out(config, split, [place for place, _ in found])
        self._names = [str(place) for place, _ in found]
        self._ends = list(itertools.accumulate(shard.num_records for _, shard in found))
        self._fingerprint = digest("array_record", *self.class_names, *(shard.blake2b for _, shard in found))
        self._records = _opened(config, split, found)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        try:
            example = decode_record(self._records.read(*self._place(index)), check=False)
        except CorruptRecordError as error:
            raise CorruptRecordError(f"{self.describe(index)} is damaged: {error}") from error
        if (wrong := contradiction(example, self.class_names)) is not None:
            raise ConfigError(f"{self.describe(index)}: {wrong}; copy the file and the manifest of the same set again")
        return {"image": example.image, "label": np.int32(example.label)}

    def read_ahead(self, indexes: Iterable[int]) -> None:
        """See `Prepares`."""
        self._records.read_ahead(map(self._place, indexes))

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]:
        """See `Prepares`."""
        return self._records.begin_copying(self._place(index)[0] for index in order)

    def copies(self) -> Copies | None:
        """See `Prepares`."""
        return self._records.copies()

    def fingerprint(self) -> str:
        """Digest of the classes and of the contents of every shard, as recorded when they were written."""
        return self._fingerprint

    def contents(self) -> str:
        """Empty: the fingerprint covers the contents."""
        return ""

    def describe(self, index: int) -> str:
        shard, number = self._place(index)
        return f"{self._names[shard]} record {number}"

    def _place(self, index: int) -> tuple[int, int]:
        """The number of an example's file, and the example's number in it."""
        index = check_index(index, len(self))
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)


class _Records(Protocol):
    """The records of files; see `BucketRecords`."""

    def read(self, shard: int, number: int) -> bytes: ...

    def read_ahead(self, wanted: Iterable[tuple[int, int]]) -> None: ...

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]: ...

    def copies(self) -> Copies | None: ...


class _LocalRecords:
    """The records of files of this machine."""

    def __init__(self, found: Sequence[tuple[Path, Shard]]) -> None:
        from nfnet_flax.data.record_files import open_records  # imports a library that a recipe does not need

        with ThreadPoolExecutor(_NUM_OPEN_THREADS) as threads:
            checked = threads.map(_check_identity, *zip(*found, strict=True))
            list(track(checked, f"checking the files in {found[0][0].parent}", "files", len(found)))
        self._paths = [str(path) for path, _ in found]
        self._starts = [0, *itertools.accumulate(shard.num_records for _, shard in found)]
        self._records = open_records({str(path): shard.num_records for path, shard in found})

    def read(self, shard: int, number: int) -> bytes:
        from nfnet_flax.data.record_files import read_record

        return read_record(self._records, self._starts[shard] + number, self._paths[shard])

    def read_ahead(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Does nothing: a disk answers at once."""

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]:
        """Does nothing."""
        return lambda: None

    def copies(self) -> None:
        """None: none are needed."""


def _opened(config: ArrayRecordSource, split: Split, found: _Found) -> _Records:
    local = [(place, shard) for place, shard in found if isinstance(place, Path)]
    remote = [(place, shard) for place, shard in found if isinstance(place, BucketUrl)]
    if not remote:
        return _LocalRecords(local)
    if local:
        patterns = config.train if split == "train" else config.eval
        raise ConfigError(f"source.{split} = {patterns!r}: gives both paths and URLs: give files of one place")
    from nfnet_flax.data.bucket_records import BucketRecords

    return BucketRecords(remote, config.kept_copies())


def _check_apart(config: ArrayRecordSource) -> None:
    """Raises ConfigError if both splits contain the same shard, under whatever name; ignores a missing split."""
    patterns: dict[Split, Sequence[str]] = {"train": config.train, "eval": config.eval}
    found: dict[Split, dict[str, Place]] = {}
    for split in patterns:
        try:
            found[split] = {shard.blake2b: path for path, shard in _listed(config, split)[1]}
        except ConfigError:  # reported when that split is opened
            return
    if shared := sorted(found["train"].keys() & found["eval"].keys(), key=lambda key: in_order(found["train"][key])):
        raise ConfigError(
            f"source.train = {config.train!r} and source.eval = {config.eval!r} share {len(shared)} shards, such as "
            f"{str(found['train'][shared[0]])!r}: an evaluation on training images means nothing; give other shards, "
            "or hold images out from the beginning of a run by --data.num-held-out"
        )


def _listed(config: ArrayRecordSource, split: Split) -> tuple[tuple[str, ...], _Found]:
    """Class names, and each file of a split with its entry in the manifest; no file is opened."""
    field, patterns = f"source.{split}", config.train if split == "train" else config.eval
    paths = find_shards(patterns, field)
    if split == "train" and (held_out := [path for path in paths if split_of(path) == "eval"]):
        raise ConfigError(
            f"{field} = {patterns!r}: takes {len(held_out)} shards of the held-out set, such as "
            f"{str(held_out[0])!r}: give only training shards, such as 'FOLDER/train-*.array_record'"
        )
    manifests = {key: read_manifest(*key) for key in sorted({(path.parent, split_of(path)) for path in paths}, key=str)}
    class_names = next(iter(manifests.values())).class_names
    for key, manifest in manifests.items():
        if manifest.class_names != class_names:
            where = str(key[0] / manifest_name(key[1]))
            raise ConfigError(f"{where!r} has other classes than the other files of {patterns!r}: use one set")
    return class_names, [(path, _shard_of(path, manifests[path.parent, split_of(path)])) for path in paths]


def _left_out(config: ArrayRecordSource, split: Split, paths: Sequence[Place]) -> tuple[Unused, ...]:
    """Shards of the sets of `paths` that no split reads. They are reported if files are listed one by one.

    Raises:
      ConfigError: patterns leave shards out, which may be a mistake.
    """
    field, patterns = f"source.{split}", config.train if split == "train" else config.eval
    unused: list[Unused] = []
    for folder, kind in sorted({(path.parent, split_of(path)) for path in paths}, key=str):
        manifest = read_manifest(folder, kind)
        # Compared by name: if a set is divided between both splits, files of the other one may be on another machine.
        read = {name for pattern in (*config.train, *config.eval) for name in described(pattern, folder, manifest)}
        missing = [shard for shard in manifest.shards if shard.file not in read | {path.name for path in paths}]
        if not missing:
            continue
        num_examples = sum(shard.num_records for shard in missing)
        text = (
            f"{len(missing)} of the {len(manifest.shards)} shards listed in {str(folder / manifest_name(kind))!r}, "
            f"with {num_examples} of its {manifest.num_records} examples, such as {missing[0].file}"
        )
        if any(is_pattern(pattern) and described(pattern, folder, manifest) for pattern in patterns):
            raise ConfigError(
                f"{field} = {patterns!r}: leaves out {text}: give a pattern that finds all, such as "
                f"{str(folder / f'{kind}-*')!r}, or name the files of a part one by one"
            )
        unused.append(Unused(len(missing), f"{field}: not used are {text}"))
    return tuple(unused)


def _shard_of(path: Place, manifest: Manifest) -> Shard:
    """The manifest's entry for a file."""
    for shard in manifest.shards:
        if shard.file == path.name:
            return shard
    raise ConfigError(f"{str(path)!r} is not listed in the manifest beside it: it belongs to another set")


def _check_identity(path: Path, shard: Shard) -> None:
    """Checks that a file is the one that its manifest describes, as far as possible without reading all of it."""
    if (size := path.stat().st_size) != shard.num_bytes:
        raise ConfigError(
            f"{str(path)!r} has {size} bytes, not the {shard.num_bytes} that were written: copy it again, or delete "
            "it and run tools/prepare_imagenet.py again"
        )
    if shard.ends_blake2b is not None and ends_digest(path) != shard.ends_blake2b:
        raise ConfigError(
            f"{str(path)!r} is not the file that the manifest beside it describes (its beginning or its end differs): "
            "it was changed, or belongs to another set; copy it again, or prepare the set again"
        )
