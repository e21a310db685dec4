"""Images of a Parquet file.

Images that lie in the file as they are get read as ranges of bytes (`parquet_pages.py`). All others are decompressed
with the row group that contains them: each row group once, when the images are copied, or once for each image if there
is no copy. Memory is taken for one row group at most.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.parquet_file import AGAIN, DamagedFile, opened
from nfnet_flax.data.parquet_pages import NotPlain, plain_values
from nfnet_flax.data.random_access import CorruptRecordError
from nfnet_flax.data.shard_files import shard_file

_IMAGES_AT_ONCE = 16


def plain_places(file: Any, shard: str, column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions and sizes of the images within the file, both (rows,) int64; None if they do not lie there as they
    are."""
    metadata, number = file.metadata, _number_of(file, column)
    described = file.schema.column(number)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    with shard_file(shard) as path:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(number)
            if not _may_be_plain(chunk) or described.max_repetition_level > 0:
                return None
            start, stop = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
            has_levels = described.max_definition_level > 0
            found.append(
                plain_values(descriptor, start, stop, metadata.row_group(group).num_rows, has_levels=has_levels)
            )
    except NotPlain:
        return None
    finally:
        os.close(descriptor)
    offsets, sizes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return offsets, sizes


def _may_be_plain(chunk: Any) -> bool:
    return chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page


def _number_of(file: Any, column: str) -> int:
    return next(number for number in range(file.metadata.num_columns) if file.schema.column(number).path == column)


def copied_bytes(file: Any, column: str) -> int:
    """Number of bytes of the images, approximately, if they must be copied; otherwise 0."""
    number = _number_of(file, column)
    chunks = [file.metadata.row_group(group).column(number) for group in range(file.metadata.num_row_groups)]
    return 0 if all(map(_may_be_plain, chunks)) else sum(chunk.total_uncompressed_size for chunk in chunks)


def copy_images(file: Any, shard: str, column: str, to: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes all images into a file, one after the other, and reads each row group once.

    Returns:
      Positions and sizes of the images in that file, both (rows,) int64.

    Raises:
      ConfigError: an image is null.
      OSError: the file cannot be written.
    """
    sizes: list[int] = []
    with to.open("wb") as copy:
        for images in _batches(file, column):
            for image in images:
                sizes.append(copy.write(_not_null(image, shard, len(sizes), column)))
        copy.flush()
        os.fsync(copy.fileno())
    all_sizes = np.array(sizes, np.int64)
    return np.cumsum(all_sizes) - all_sizes, all_sizes


def check_no_nulls(file: Any, shard: str, column: str) -> None:
    """Raises ConfigError if the statistics of the file say that an image is null."""
    number, row = _number_of(file, column), 0
    for group in range(file.metadata.num_row_groups):
        statistics = file.metadata.row_group(group).column(number).statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count > 0:
            for images in _batches(file, column, [group]):
                for image in images:
                    _not_null(image, shard, row, column)
                    row += 1
        row = sum(file.metadata.row_group(before).num_rows for before in range(group + 1))


def _not_null(image: bytes | None, shard: str, row: int, column: str) -> bytes:
    if image is None:
        raise ConfigError(
            f"{shard} row {row}: column {column!r} is null: the image is missing, or is a file outside: write the set "
            "with its images inside, as push_to_hub does, or remove the row"
        )
    return image


def _batches(file: Any, column: str, groups: list[int] | None = None) -> Iterator[list[bytes | None]]:
    """A few images at a time, in the order of the rows; each row group is read once."""
    for batch in file.iter_batches(batch_size=_IMAGES_AT_ONCE, row_groups=groups, columns=[column], use_threads=False):
        array = batch.column(0)
        if column not in file.schema_arrow.names:  # a structure
            array = array.flatten()[0]
        yield array.to_pylist()


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """Images that are decompressed with their row group, each time that one is read."""

    shard: str
    """The file."""
    column: str
    """Path of the column."""

    def read(self, offset: int, size: int) -> bytes:
        """The image of row `offset`; the size is not known.

        Raises:
          ConfigError: the image is null.
          CorruptRecordError: the row group is damaged.
          OSError: the file cannot be read.
        """
        del size
        try:
            with opened(self.shard) as file:
                return self._read(file, offset)
        except DamagedFile as error:
            raise CorruptRecordError(f"{self.shard} row {offset}: {error}") from error

    def _read(self, file: Any, row: int) -> bytes:
        group, rest = 0, row
        while rest >= file.metadata.row_group(group).num_rows:
            rest -= file.metadata.row_group(group).num_rows
            group += 1
        for images in _batches(file, self.column, [group]):
            if rest < len(images):
                return _not_null(images[rest], self.shard, row, self.column)
            rest -= len(images)
        raise DamagedFile(f"{self.shard!r}: a row group has fewer rows than its metadata say: {AGAIN}")
