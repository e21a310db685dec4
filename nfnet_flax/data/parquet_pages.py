"""The place of each value of a Parquet column within the file, where values are stored as they are.

Parquet libraries read whole pages and row groups: 100 images or more, to get one. In a column that is neither
compressed nor encoded (`UNCOMPRESSED`, `PLAIN`), which is how the Hugging Face hub's library writes images, a value is
a range of bytes of the file. The code here finds these ranges: it reads the headers of the pages (Thrift's compact
protocol) and the length before each value, and nothing else. See
https://parquet.apache.org/docs/file-format/data-pages/.
"""

import os
import struct
from typing import Any

import numpy as np

_HEADER_BYTES = 1 << 12
_MAX_HEADER_BYTES = 1 << 24
_LENGTH = struct.Struct("<I")
_DATA_PAGE, _INDEX_PAGE, _DATA_PAGE_V2 = 0, 1, 3
_PLAIN, _RLE = 0, 3
# Fields of PageHeader, DataPageHeader and DataPageHeaderV2 in parquet.thrift.
_TYPE, _COMPRESSED_SIZE, _V1, _V2 = 1, 3, 5, 8
_V1_NUM_VALUES, _V1_ENCODING, _V1_LEVELS = 1, 2, 3
_V2_NUM_VALUES, _V2_ENCODING, _V2_DEFINITION_BYTES, _V2_REPETITION_BYTES = 1, 4, 5, 6


class NotPlain(ValueError):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """Values do not lie in the file as they are, or some of them are null."""


def plain_values(
    file: int, start: int, stop: int, num_values: int, *, has_levels: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The places of the values of an uncompressed column chunk of type BYTE_ARRAY without repetition.

    Args:
      file: descriptor of the file.
      start: position of the first page of the chunk.
      stop: position after its last page.
      num_values: number of values that it must have.
      has_levels: whether values may be null, so that definition levels precede them.

    Returns:
      Positions and sizes in bytes, both (num_values,) int64.

    Raises:
      NotPlain: a page is encoded in another way, has fewer values than rows, or is not understood.
      OSError: the file cannot be read.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    position = start
    while position < stop:
        header, body = _page_header(file, position, stop)
        position = body + int(header[_COMPRESSED_SIZE])
        if not body <= position <= stop:
            raise NotPlain(f"a page ends at {position}, and its column chunk at {stop}")
        if header[_TYPE] == _INDEX_PAGE:
            continue
        try:
            first, count = _first_value(file, header, body, has_levels=has_levels)
        except (KeyError, TypeError) as error:
            raise NotPlain(f"the header of a page is damaged ({error!r})") from error
        if not body <= first <= position:
            raise NotPlain("the levels of a page end beyond it")
        _walk(file, first, position, count, offsets, sizes)
    if len(offsets) != num_values:
        raise NotPlain(f"{len(offsets)} values for {num_values} rows")
    return np.array(offsets, np.int64), np.array(sizes, np.int64)


def _first_value(file: int, header: dict[int, Any], body: int, *, has_levels: bool) -> tuple[int, int]:
    """Position of the first value of a data page (of its length), and the number of its values."""
    if header[_TYPE] == _DATA_PAGE and _V1 in header:
        page = header[_V1]
        if page[_V1_ENCODING] != _PLAIN or (has_levels and page[_V1_LEVELS] != _RLE):
            raise NotPlain(f"encodings {page[_V1_ENCODING]} and {page[_V1_LEVELS]}")
        skipped = _LENGTH.size + _length(file, body) if has_levels else 0
        return body + skipped, int(page[_V1_NUM_VALUES])
    if header[_TYPE] == _DATA_PAGE_V2 and _V2 in header:
        page = header[_V2]
        if page[_V2_ENCODING] != _PLAIN:
            raise NotPlain(f"encoding {page[_V2_ENCODING]}")
        return body + int(page[_V2_DEFINITION_BYTES]) + int(page[_V2_REPETITION_BYTES]), int(page[_V2_NUM_VALUES])
    raise NotPlain(f"a page of type {header[_TYPE]}")  # a dictionary, above all


def _walk(file: int, position: int, stop: int, count: int, offsets: list[int], sizes: list[int]) -> None:
    """Appends the places of the values of a page: each has its length before it."""
    for _ in range(count):
        if position + _LENGTH.size > stop:
            raise NotPlain("a page has fewer values than rows")
        size = _length(file, position)
        offsets.append(position + _LENGTH.size)
        sizes.append(size)
        position += _LENGTH.size + size
    if position != stop:
        raise NotPlain(f"the values of a page end at {position}, and the page at {stop}")


def _length(file: int, position: int) -> int:
    content = os.pread(file, _LENGTH.size, position)
    if len(content) < _LENGTH.size:
        raise NotPlain("the file ends within a page")
    return int(_LENGTH.unpack(content)[0])


def _page_header(file: int, position: int, stop: int) -> tuple[dict[int, Any], int]:
    """The header of a page, and the position after it."""
    size = _HEADER_BYTES
    while True:
        content = os.pread(file, min(size, stop - position), position)
        reader = _Compact(content)
        try:
            header = reader.read_struct()
            int(header[_TYPE]), int(header[_COMPRESSED_SIZE])
            return header, position + reader.position
        except IndexError as error:  # it may contain statistics, which may be long
            if len(content) < size or size >= _MAX_HEADER_BYTES:
                raise NotPlain("the header of a page is cut off") from error
            size *= 16
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise NotPlain(f"the header of a page is damaged ({error})") from error


class _Compact:
    """Reads structs of Thrift's compact protocol. Raises IndexError at the end of the bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def read_struct(self) -> dict[int, Any]:
        """Number of each field -> its value; texts, which nobody needs, are None."""
        fields: dict[int, Any] = {}
        number = 0
        while (start := self._byte()) != 0:
            number = number + (start >> 4) if start >> 4 else self._zigzag()
            fields[number] = self._value(start & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._number())
        if kind in (9, 10):
            start = self._byte()
            count = self._number() if start >> 4 == 15 else start >> 4
            return [self._byte() == 1 if start & 15 in (1, 2) else self._value(start & 15) for _ in range(count)]
        if kind == 12:
            return self.read_struct()
        raise ValueError(f"type {kind}")

    def _byte(self) -> int:
        value = self._content[self.position]
        self.position += 1
        return value

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self._content):
            raise IndexError(self.position)

    def _number(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _zigzag(self) -> int:
        value = self._number()
        return (value >> 1) ^ -(value & 1)
