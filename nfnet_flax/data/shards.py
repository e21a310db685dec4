"""Writing one file of a prepared set, and checking one. These functions run in worker processes."""

import hashlib
import io
import os
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore[import-untyped]
from PIL import Image

from nfnet_flax.config import ConfigError
from nfnet_flax.data.array_records import WRITER_OPTIONS, Shard, decode_record, encode_record, open_records
from nfnet_flax.data.listing import Listing
from nfnet_flax.data.random_access import CorruptRecordError

PARTIAL_SUFFIX = ".partial"
"""Of a file that is being written; it gets its name when it is complete and on the disk."""


def make_shard(path: Path, listing: Listing) -> Shard:
    """Writes the examples of a listing to a file, or keeps the file that is there; either way reads it back.

    Raises:
      ConfigError: the disk is full, an image cannot be read, or the file that is there holds something else.
    """
    if path.exists():
        return _read_back(path, listing)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        for index in range(len(listing)):
            writer.write(encode_record(listing.read(index)))
        writer.close()
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)  # a full disk must not stay full of halves
        raise ConfigError(f"{str(path)!r} cannot be written: {error}") from error
    shard = _read_back(partial, listing)
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)
    return Shard(file=path.name, num_records=shard.num_records, num_bytes=shard.num_bytes, blake2b=shard.blake2b)


def _read_back(path: Path, listing: Listing) -> Shard:
    records = open_records({str(path): len(listing)})
    for index in range(len(listing)):
        try:
            example = decode_record(records[index], check=True)
        except (RuntimeError, CorruptRecordError) as error:
            raise ConfigError(f"{path} record {index} is damaged ({error}): delete the file, and run again") from error
        if (example.label, example.name) != (listing.labels[index], listing.name(index)):
            raise ConfigError(f"{path} record {index} is {example.name}, not {listing.name(index)}: delete the file")
    return Shard(file=path.name, num_records=len(listing), num_bytes=path.stat().st_size, blake2b=_file_digest(path))


def check_shard(path: Path, shard: Shard, class_names: tuple[str, ...]) -> list[str]:
    """Compares a file with its manifest and decodes every image in it.

    Returns:
      One line per problem; none if all is well.
    """
    if not path.is_file():
        return [f"{path} is missing"]
    problems = []
    if (size := path.stat().st_size) != shard.num_bytes:
        problems.append(f"{path} has {size} bytes, not {shard.num_bytes}")
    records = open_records({str(path): shard.num_records})
    for index in range(shard.num_records):
        try:
            example = decode_record(records[index], check=True)
            if not 0 <= example.label < len(class_names):
                raise CorruptRecordError(f"label {example.label} is none of {len(class_names)} classes")
            if example.name.split("/")[0] != class_names[example.label]:
                raise CorruptRecordError(f"{example.name} is labelled {class_names[example.label]}")
        except (RuntimeError, CorruptRecordError) as error:
            problems.append(f"{path} record {index} is damaged: {error}")
            continue
        try:
            with Image.open(io.BytesIO(example.image)) as image:
                image.load()
        except Exception as error:  # Pillow's decoders raise whatever they come upon
            problems.append(f"{path} record {index} ({example.name}) does not decode: {type(error).__name__}: {error}")
    if not problems and _file_digest(path) != shard.blake2b:
        problems.append(f"{path} was changed outside its records: its BLAKE2b differs")
    return problems


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
