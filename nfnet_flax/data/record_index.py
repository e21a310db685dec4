"""Where each record of an ArrayRecord file is, and how its bytes are read, without having the whole file.

The library reads only files, or buckets of one provider by code of its own. What is needed of the format is little, as
the sets have one record per chunk and no compression (`array_records.WRITER_OPTIONS`): a file is a series of chunks,
with a header of 24 bytes at each multiple of 64 KiB, even within a chunk. The last block of 64 KiB holds the position
of the footer, a chunk that lists where the other chunks begin. All numbers are little-endian.
"""

import itertools
import struct
from collections.abc import Callable

import numpy as np

from nfnet_flax.data.random_access import CorruptRecordError

_BLOCK_BYTES = 1 << 16
_BLOCK_HEADER_BYTES = 24
_CHUNK_HEADER = struct.Struct("<QQQBxxxxxxxQ")
"""Header of a chunk, which is a group of records: checksum of the header, size of the data in bytes, checksum of the
data, type of the chunk (the number of records, which follows, is not read), size of the decoded data in bytes."""
_SIMPLE, _UNCOMPRESSED = ord("r"), 0
_MAGIC = 0x71930E704FDAE05E
"""What the last block holds in every ArrayRecord file."""
_POSITION, _FOOTER, _MAGIC_FIELD = 0x08, 0x08, 0x10
"""Beginning of the fields of the index and of the last block, as protocol buffers encode them."""


def read_index(read: Callable[[int, int], bytes], size: int, num_records: int) -> np.ndarray:
    """The positions of the chunks of a file.

    Args:
      read: returns the bytes from one position of the file to another.
      size: number of bytes of the file.
      num_records: number of its records.

    Returns:
      (num_records + 1,) int64: record i is in the bytes from element i to element i + 1.

    Raises:
      CorruptRecordError: the file is not an ArrayRecord file with so many records, or is damaged.
    """
    guess = max(0, size - _BLOCK_BYTES - 24 * num_records - 4096) // _BLOCK_BYTES * _BLOCK_BYTES
    tail = read(guess, size)
    footer = _footer_position(tail[-_BLOCK_BYTES:], size)
    if footer < guess:
        tail, guess = read(footer, guess) + tail, footer
    entries = _values(tail[footer - guess : size - _BLOCK_BYTES - guess], footer)
    if len(entries) != num_records + 1:  # the first one describes the file
        raise CorruptRecordError(f"the index has {len(entries) - 1} records, not {num_records}")
    positions = np.append(_positions(entries[1:]), footer)
    if not np.all(np.diff(positions) > 0):
        raise CorruptRecordError("the index is not in order")
    return positions


def record_of(chunk: bytes, position: int) -> bytes:
    """The record in the bytes of a chunk that begins at `position` of the file; its checksum is not compared.

    Raises:
      CorruptRecordError: the bytes are no chunk with one record.
    """
    values = _values(chunk, position)
    if len(values) != 1:
        raise CorruptRecordError(f"{len(values)} records are where one should be")
    return values[0]


def _footer_position(block: bytes, size: int) -> int:
    values = _values(block, size - _BLOCK_BYTES)
    data = np.frombuffer(values[0], np.uint8) if values else np.zeros(0, np.uint8)
    if len(data) < 2 or data[0] != _FOOTER:
        raise CorruptRecordError("it does not end like an ArrayRecord file")
    position, end = _numbers(data, np.array([1]))
    if data[end[0] : end[0] + 1].tolist() != [_MAGIC_FIELD] or _numbers(data, end + 1)[0][0] != _MAGIC:
        raise CorruptRecordError("it does not end like an ArrayRecord file")
    return int(position[0])


def _values(chunk: bytes, position: int) -> list[bytes]:
    """The values of a chunk, which begins at a position of its file."""
    pieces, end = [], position + len(chunk)
    first_border = position // _BLOCK_BYTES * _BLOCK_BYTES
    for border in range(first_border, end, _BLOCK_BYTES):
        start = position if border < position else border + _BLOCK_HEADER_BYTES
        pieces.append(chunk[start - position : min(border + _BLOCK_BYTES, end) - position])
    body = b"".join(pieces)
    if len(body) < _CHUNK_HEADER.size + 2:
        raise CorruptRecordError("a chunk is too short")
    _, data_bytes, _, kind, num_bytes = _CHUNK_HEADER.unpack_from(body)
    data = np.frombuffer(body, np.uint8)[_CHUNK_HEADER.size : _CHUNK_HEADER.size + data_bytes]
    if len(data) != data_bytes or kind != _SIMPLE or data_bytes < 2 or data[0] != _UNCOMPRESSED:
        raise CorruptRecordError("bytes that should be a record are none")
    (sizes_bytes,), (start,) = _numbers(data, np.array([1]))
    sizes = data[start : start + sizes_bytes]
    ends = np.flatnonzero(sizes < 0x80)
    lengths, _ = _numbers(sizes, np.append(0, ends[:-1] + 1)) if len(ends) else (np.zeros(0, np.int64), None)
    values = data[start + sizes_bytes :].tobytes()
    if lengths.sum() != num_bytes or len(values) != num_bytes:
        raise CorruptRecordError("the sizes of records do not add up")
    borders = np.append(0, np.cumsum(lengths)).tolist()
    return [values[one:other] for one, other in itertools.pairwise(borders)]


def _positions(entries: list[bytes]) -> np.ndarray:
    """The field `chunk_offset`, the first one, of each entry of an index."""
    data = np.frombuffer(b"".join(entries), np.uint8)
    starts = np.append(0, np.cumsum([len(entry) for entry in entries[:-1]])).astype(np.int64)
    if not all(entries) or np.any(data[starts] != _POSITION):
        raise CorruptRecordError("the index is damaged")
    return _numbers(data, starts + 1)[0]


def _numbers(data: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of variable length (7 bits in each byte, the lowest first; the last byte is below 128).

    Args:
      data: (N,) uint8.
      starts: (M,) int64: where each number begins.

    Returns:
      The (M,) int64 numbers, and where each ends.
    """
    found, ends = np.zeros(len(starts), np.uint64), np.array(starts, np.int64)
    is_open = np.ones(len(starts), bool)
    for shift in range(0, 70, 7):
        if np.any(ends[is_open] >= len(data)):
            break
        byte = data[np.minimum(ends, len(data) - 1)].astype(np.uint64)
        found = np.where(is_open, found | ((byte & np.uint64(0x7F)) << np.uint64(shift)), found)
        ends = ends + is_open
        is_open = is_open & (byte >= 0x80)
        if not is_open.any():
            return found.astype(np.int64), ends
    raise CorruptRecordError("a number has no end")
