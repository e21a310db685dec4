"""Reading a record of an ArrayRecord file, so that a failing disk can be distinguished from a damaged file.

The library raises the same error for both, and none if a file ends too early: then it returns an empty record.
"""

import re
from collections.abc import Mapping

from array_record.python import array_record_data_source as ars  # type: ignore[import-untyped]

from nfnet_flax.data.random_access import CorruptRecordError

_SYSTEM_CALL_FAILED = re.compile(r"\w+\(\) failed: ")
_BLOCK_BYTES = 1 << 20


def open_records(files: Mapping[str, int]) -> ars.ArrayRecordDataSource:
    """Random access to the records of files. Their numbers of records are given, so that no file need be opened yet.

    A file is opened at its first read, in the process that reads it, and again after unpickling.
    """
    paths = [f"{path}[0:{num_records}]" for path, num_records in files.items()]
    return ars.ArrayRecordDataSource(paths, reader_options={"max_parallelism": "0"})


def read_record(records: ars.ArrayRecordDataSource, index: int, path: str) -> bytes:
    """The bytes of a record.

    Args:
      records: the records of one or several files.
      index: index of the record among them.
      path: path of the file that contains it.

    Raises:
      OSError: the file cannot be opened or read.
      CorruptRecordError: the file can be read, but the record is not in it, or its checksum differs.
    """
    try:
        record = records[index]
    except (RuntimeError, IndexError) as error:
        _check_readable(path, str(error))
        raise CorruptRecordError(str(error)) from error
    if not record:
        _check_readable(path, "")
        raise CorruptRecordError("the file ends before it, or contains fewer records than it should")
    return bytes(record)


def _check_readable(path: str, message: str) -> None:
    """Raises OSError unless a file can be read to its end; `message` is the library's error message."""
    if _SYSTEM_CALL_FAILED.match(message):
        raise OSError(message)
    with open(path, "rb", buffering=0) as file:
        while file.read(_BLOCK_BYTES):
            pass
