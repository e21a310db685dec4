"""Sets of images in ArrayRecord files: the format that `tools/prepare_imagenet.py` writes.

A set is a folder. For each split it contains shards `train-00000-of-00256.array_record` ... and a manifest
`train.json`, which is written last. The manifest lists the classes and, for each shard, the number of records, the
size, the BLAKE2b of the whole file, and the BLAKE2b of its two ends. Every start compares the latter with the file, as
reading the whole file would take too long. A record is one example, little-endian:

    4 bytes   CRC-32 of all that follows
    4 bytes   label, int32
    2 bytes   length of the name
    ...       name, UTF-8: class_name/file_name
    ...       the encoded image, unchanged

Each record is a group of its own, for random access, and is not compressed, as encoded images do not become smaller.
"""

import dataclasses
import fnmatch
import glob
import hashlib
import os
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nfnet_flax.config import ConfigError, check_types
from nfnet_flax.config_json import from_json
from nfnet_flax.data.buckets import Place, content_of, in_order, matching
from nfnet_flax.data.random_access import CorruptRecordError
from nfnet_flax.json_files import parse_json, read_json
from nfnet_flax.paths import escaped, local_path
from nfnet_flax.storage import BucketUrl, bucket_url

WRITER_OPTIONS = "group_size:1,uncompressed"
FORMAT_VERSION = 2
"""Version of the format. Version 1 had no `Shard.ends_blake2b`; such sets can still be read."""
ENDS_BYTES = 1 << 16
"""Number of bytes at each end of a shard that are compared at every start; every shard has more of them."""
_UNFINISHED = (
    "it is written last, so either the set is unfinished (run tools/prepare_imagenet.py again), or the file was not "
    "copied whole along with the shards"
)
_HOW_TO_GET_IT = "python tools/prepare_imagenet.py --help says how to make such a set"
_CRC = struct.Struct("<I")
_LABEL_AND_NAME_LENGTH = struct.Struct("<iH")
_HEADER_BYTES = _CRC.size + _LABEL_AND_NAME_LENGTH.size
_SHARD_NAME = re.compile(r"(train|eval)-\d{5}-of-\d{5}\.array_record")


class Example(NamedTuple):
    """The contents of a record."""

    label: int
    name: str
    """`class_name/file_name`."""
    image: bytes
    """The bytes of the encoded file."""


def encode_record(example: Example) -> bytes:
    """The bytes of a record."""
    name = example.name.encode(errors="surrogateescape")
    body = _LABEL_AND_NAME_LENGTH.pack(example.label, len(name)) + name + example.image
    return _CRC.pack(zlib.crc32(body)) + body


def decode_record(record: bytes, *, check: bool) -> Example:
    """The inverse of `encode_record`.

    Args:
      record: bytes of the record.
      check: whether to compare the checksum. Not needed after a plain read, which compares the file's own checksums.

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


def contradiction(example: Example, class_names: Sequence[str]) -> str | None:
    """The problem if a record's label does not agree with the class in its name; None if they agree."""
    label = example.label
    is_class = 0 <= label < len(class_names)
    wanted = repr(class_names[label]) if is_class else f"none of {len(class_names)} classes"
    if is_class and example.name.startswith(f"{class_names[label]}/"):
        return None
    return f"it is {example.name!r}, but its label {label} is {wanted} in the manifest: the file belongs to another set"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a set."""

    file: str
    """Name of the file, without folder."""
    num_records: int
    """Number of examples in the file."""
    num_bytes: int
    """Size of the file."""
    blake2b: str
    """Hexadecimal BLAKE2b (64 bytes) of the file."""
    ends_blake2b: str | None
    """`ends_digest` of the file; None: the set was prepared by a version that did not record it."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a split, stored as JSON in the folder of its shards."""

    format_version: int
    """Version of the format of the records and of this file."""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    input_digest: str
    """Digest of the images that the split was made from (names, labels, sizes), and of the number of shards."""
    shards: tuple[Shard, ...]
    """Files of the split, in the order of the examples."""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def num_records(self) -> int:
        return sum(shard.num_records for shard in self.shards)


def manifest_name(split: str) -> str:
    """File name of the manifest of a split."""
    return f"{split}.json"


def shard_name(split: str, index: int, num_shards: int) -> str:
    """File name of a shard."""
    return f"{split}-{index:05d}-of-{num_shards:05d}.array_record"


def read_manifest(folder: Place, split: str) -> Manifest:
    """Reads a manifest.

    Raises:
      ConfigError: it is missing, damaged, or of another version of the format.
      OSError: it cannot be read.
    """
    path = folder / manifest_name(split)
    if isinstance(path, BucketUrl):
        try:
            data = parse_json(content_of(path), path, _UNFINISHED)
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist: {_UNFINISHED}") from error
    else:
        data = read_json(path, _UNFINISHED)
    version = data.get("format_version")
    if version == 1:
        for shard in data.get("shards", ()):
            shard["ends_blake2b"] = None
    elif version != FORMAT_VERSION:
        raise ConfigError(f"{str(path)!r} is no manifest of format version 1 to {FORMAT_VERSION}: {_HOW_TO_GET_IT}")
    manifest: Manifest = from_json(Manifest, data, path.name)
    return manifest


def ends_digest(path: Path) -> str:
    """Hexadecimal BLAKE2b of the first and the last 64 KiB of a file: its first images, and the index of its
    records."""
    with open(path, "rb") as file:
        ends = file.read(ENDS_BYTES)
        file.seek(max(0, os.fstat(file.fileno()).st_size - ENDS_BYTES))
        return hashlib.blake2b(ends + file.read(ENDS_BYTES)).hexdigest()


def split_of(path: Place) -> str:
    """`train` or `eval`, from the name of a shard."""
    return path.name.split("-")[0]


def find_shards(patterns: Sequence[str], field: str) -> list[Place]:
    """The files that patterns name, sorted.

    Args:
      patterns: files, or shell-style patterns: paths or URLs.
      field: name of the field in which they were given, for messages.

    Raises:
      ConfigError: a pattern finds nothing, finds a file that is not a shard, or misses shards that its manifest lists.
      OSError: a bucket cannot be listed.
    """
    found: set[Place] = set()
    for pattern in patterns:
        paths = _matches(pattern, field)
        if not paths:
            raise ConfigError(f"{field} = {pattern!r}: no file matches: check the path; {_HOW_TO_GET_IT}")
        for path in paths:
            if not _SHARD_NAME.fullmatch(path.name):
                raise ConfigError(
                    f"{field} = {pattern!r}: {str(path)!r} is not named like a shard, {shard_name('train', 0, 256)}: "
                    f"give only shards, such as 'FOLDER/train-*.array_record'; {_HOW_TO_GET_IT}"
                )
        for folder, split in sorted({(path.parent, split_of(path)) for path in paths}, key=str):
            wanted = {shard.file for shard in read_manifest(folder, split).shards}
            missing = sorted({*fnmatch.filter(wanted, Path(pattern).name)} - {path.name for path in paths})
            if missing:
                raise ConfigError(
                    f"{field} = {pattern!r}: {len(missing)} of the {len(wanted)} shards listed in "
                    f"{str(folder / manifest_name(split))!r} are missing, such as {missing[0]}: copy them, or prepare "
                    "the set again"
                )
        found.update(paths)
    return sorted(found, key=in_order)


def is_pattern(text: str) -> bool:
    """Whether the last part of a path is a pattern, which may match several files."""
    return glob.has_magic(Path(text).name)


def described(pattern: str, folder: Place, manifest: Manifest) -> list[str]:
    """The shards of a manifest in `folder` that a file or pattern matches, whether or not they exist."""
    if (url := bucket_url("pattern", pattern)) is not None:
        return fnmatch.filter([shard.file for shard in manifest.shards], url.name) if url.parent == folder else []
    where = local_path("pattern", pattern).parent
    if where != folder and not fnmatch.fnmatchcase(str(folder), escaped(where)):
        return []
    return fnmatch.filter([shard.file for shard in manifest.shards], Path(pattern).name)


def _matches(pattern: str, field: str) -> Sequence[Place]:
    """The files that match."""
    if (url := bucket_url(field, pattern)) is not None:
        return matching(url)
    return [Path(path) for path in glob.glob(escaped(local_path(field, pattern)))]
