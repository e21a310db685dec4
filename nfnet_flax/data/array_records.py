"""Sets of images in ArrayRecord files: the format that `tools/prepare_imagenet.py` writes, and its source.

A set is a folder with, per split, shards `train-00000-of-00256.array_record` ... and a manifest `train.json`, which is
written last and holds the class list and each shard's length, size and BLAKE2b. A record is one example, little-endian:

    4 bytes   CRC-32 of all that follows
    4 bytes   label, int32
    2 bytes   length of the name
    ...       name, UTF-8: class_name/file_name
    ...       the encoded image, as it was found

Records lie in groups of one, for random access, and uncompressed: encoded images do not shrink.
"""

import bisect
import dataclasses
import fnmatch
import glob
import itertools
import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_data_source as ars  # type: ignore[import-untyped]

from nfnet_flax.config import ConfigError, check_types, from_json
from nfnet_flax.data.random_access import CorruptRecordError, Record, check_index, digest

WRITER_OPTIONS = "group_size:1,uncompressed"
FORMAT_VERSION = 1
_HOW_TO_GET_IT = "python tools/prepare_imagenet.py --help says how to make such a set"
_CRC = struct.Struct("<I")
_LABEL_AND_NAME_LENGTH = struct.Struct("<iH")
_HEADER_BYTES = _CRC.size + _LABEL_AND_NAME_LENGTH.size
_SHARD_NAME = re.compile(r"(train|eval)-\d{5}-of-\d{5}\.array_record")


class Example(NamedTuple):
    """What a record holds."""

    label: int
    name: str
    """`class_name/file_name`."""
    image: bytes
    """An encoded file."""


def encode_record(example: Example) -> bytes:
    """The bytes of a record."""
    name = example.name.encode(errors="surrogateescape")
    body = _LABEL_AND_NAME_LENGTH.pack(example.label, len(name)) + name + example.image
    return _CRC.pack(zlib.crc32(body)) + body


def decode_record(record: bytes, *, check: bool) -> Example:
    """The inverse of `encode_record`.

    Args:
      record: its bytes.
      check: compares the checksum. Not needed after a plain read, where the file's own checksums are compared.

    Raises:
      CorruptRecordError: the record is too short, or its checksum differs.
    """
    if len(record) < _HEADER_BYTES:
        raise CorruptRecordError(f"a record of {len(record)} bytes is shorter than its header")
    if check and _CRC.unpack_from(record)[0] != zlib.crc32(record[_CRC.size :]):
        raise CorruptRecordError("the record's checksum differs")
    label, name_length = _LABEL_AND_NAME_LENGTH.unpack_from(record, _CRC.size)
    start = _HEADER_BYTES + name_length
    if len(record) < start:
        raise CorruptRecordError(f"a record of {len(record)} bytes is shorter than its name")
    return Example(label, record[_HEADER_BYTES:start].decode(errors="surrogateescape"), record[start:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a set."""

    file: str
    """Its name, without folder."""
    num_records: int
    """Examples in it."""
    num_bytes: int
    """Its size."""
    blake2b: str
    """Hexadecimal BLAKE2b (64 bytes) of the file."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a split consists of; stored as JSON beside its shards."""

    format_version: int
    """Of the records and of this file."""
    class_names: tuple[str, ...]
    """In the order of the labels."""
    input_digest: str
    """Of what the split was made from: names, labels, sizes, number of shards."""
    shards: tuple[Shard, ...]
    """In the order of the examples."""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def num_records(self) -> int:
        return sum(shard.num_records for shard in self.shards)


def manifest_path(folder: Path, split: str) -> Path:
    """Where the manifest of a split lies."""
    return folder / f"{split}.json"


def shard_name(split: str, index: int, num_shards: int) -> str:
    """File name of a shard."""
    return f"{split}-{index:05d}-of-{num_shards:05d}.array_record"


def read_manifest(folder: Path, split: str) -> Manifest:
    """Reads a manifest.

    Raises:
      ConfigError: it is missing, damaged, or of another version of the format.
    """
    path = manifest_path(folder, split)
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{str(path)!r} is missing: it is written last, so either the set is unfinished (run "
            "tools/prepare_imagenet.py again), or the file was not copied along with the shards"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is damaged ({error}): copy it again") from error
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{str(path)!r} is no manifest of format version {FORMAT_VERSION}: {_HOW_TO_GET_IT}")
    manifest: Manifest = from_json(Manifest, data, path.name)
    return manifest


def open_records(files: Mapping[str, int]) -> ars.ArrayRecordDataSource:
    """Random access to the records of files, of which the lengths are given so that none need be opened yet.

    A file is opened at its first read, in whichever process that is, and again after unpickling.
    """
    paths = [f"{path}[0:{num_records}]" for path, num_records in files.items()]
    return ars.ArrayRecordDataSource(paths, reader_options={"max_parallelism": "0"})


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns name, sorted.

    Raises:
      ConfigError: a pattern finds nothing, finds a file that is no shard, or misses shards that its manifest lists.
    """
    found: set[Path] = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        paths = [Path(path) for path in glob.glob(pattern)] or ([Path(pattern)] if os.path.isfile(pattern) else [])
        if not paths:
            raise ConfigError(f"no file matches {pattern!r}: check the path; {_HOW_TO_GET_IT}")
        for path in paths:
            if not _SHARD_NAME.fullmatch(path.name):
                raise ConfigError(
                    f"{str(path)!r} (of {pattern!r}) is not named like a shard, {shard_name('train', 0, 256)}: "
                    f"name the shards alone; {_HOW_TO_GET_IT}"
                )
        for folder, split in sorted({(path.parent, path.name.split("-")[0]) for path in paths}):
            wanted = {shard.file for shard in read_manifest(folder, split).shards}
            missing = sorted({*fnmatch.filter(wanted, Path(pattern).name)} - {path.name for path in paths})
            if missing:
                raise ConfigError(
                    f"{pattern!r}: {len(missing)} of the {len(wanted)} shards listed in "
                    f"{str(manifest_path(folder, split))!r} are missing, such as {missing[0]}: copy them, or prepare "
                    "the set again"
                )
        found.update(paths)
    return sorted(found)


class ArrayRecords:
    """A split, or some shards of one, prepared by `tools/prepare_imagenet.py`; images stay encoded."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Looks at the manifest and at the sizes of the files; opens none of them.

        Args:
          patterns: files, or shell-style patterns.

        Raises:
          ConfigError: as `find_shards` and `read_manifest`, or files differ from their manifest or in their classes.
        """
        paths = find_shards(patterns)
        manifests = {
            key: read_manifest(*key) for key in sorted({(path.parent, path.name.split("-")[0]) for path in paths})
        }
        self.class_names = next(iter(manifests.values())).class_names
        for (folder, split), manifest in manifests.items():
            if manifest.class_names != self.class_names:
                where = str(manifest_path(folder, split))
                raise ConfigError(f"{where!r} has other classes than the other files of {patterns!r}: use one set")
        shards = [_shard_of(path, manifests[path.parent, path.name.split("-")[0]]) for path in paths]
        self._paths = [str(path) for path in paths]
        self._ends = list(itertools.accumulate(shard.num_records for shard in shards))
        self._fingerprint = digest("array_record", *self.class_names, *(shard.blake2b for shard in shards))
        lengths = [shard.num_records for shard in shards]
        self._records = open_records(dict(zip(self._paths, lengths, strict=True)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, len(self))
        try:
            example = decode_record(self._records[index], check=False)
        except (RuntimeError, CorruptRecordError) as error:
            raise CorruptRecordError(f"{self.describe(index)} is damaged: {error}") from error
        return {"image": example.image, "label": np.int32(example.label)}

    def fingerprint(self) -> str:
        """Of the classes and of the contents of every shard, as recorded when they were written."""
        return self._fingerprint

    def describe(self, index: int) -> str:
        index = check_index(index, len(self))
        shard = bisect.bisect_right(self._ends, index)
        return f"{self._paths[shard]} record {index - (self._ends[shard - 1] if shard else 0)}"


def _shard_of(path: Path, manifest: Manifest) -> Shard:
    """The manifest's entry of a file, once the file is seen to have the size that is written there."""
    shard = next((shard for shard in manifest.shards if shard.file == path.name), None)
    if shard is None:
        raise ConfigError(f"{str(path)!r} is not listed in the manifest beside it: it belongs to another set")
    if (size := path.stat().st_size) != shard.num_bytes:
        raise ConfigError(
            f"{str(path)!r} has {size} bytes, not the {shard.num_bytes} that were written: copy it again, or delete "
            "it and run tools/prepare_imagenet.py again"
        )
    return shard
