"""Writing one file of a prepared set, and checking one, on a disk or in a bucket. These functions run in worker
processes (`worker_pool`)."""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore[import-untyped]

from nfnet_flax.config import ConfigError
from nfnet_flax.data.array_records import (
    WRITER_OPTIONS,
    Example,
    Shard,
    contradiction,
    decode_record,
    encode_record,
    ends_digest,
)
from nfnet_flax.data.buckets import Place, failing
from nfnet_flax.data.decode import CorruptImageError, decode
from nfnet_flax.data.listing import Listing
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.data.random_access import CorruptRecordError
from nfnet_flax.data.record_files import open_records, read_record
from nfnet_flax.storage import BucketUrl
from nfnet_flax.storage.objects import ObjectFolder, StoredObject, digests

PARTIAL_SUFFIX = ".partial"
"""Suffix of a file that is being written; it gets its final name when it is complete and on the disk."""
_AGAIN = "run the command that prepared it again"


def make_shard(folder: Place, name: str, listing: Listing) -> Shard:
    """Writes the examples of a listing to a file, or keeps an existing file; in both cases reads the file back.

    A file of a bucket is made in the system's folder for temporary files, and uploaded.

    Raises:
      ConfigError: the disk is full, or the existing file has other contents.
      InputFailed: an image or the written file cannot be read.
      OSError: the store failed.
    """
    if isinstance(folder, Path):
        return _make_shard(folder / name, listing)
    with _fetched(folder, name) as (path, about), failing():
        if about is not None:
            return _read_back(path, listing)
        shard = _make_shard(path, listing)
        bucket = ObjectFolder(folder)
        bucket.upload(path, name)
        stored = bucket.object(name)
        if (stored.size, stored.checksum) != (shard.num_bytes, digests(path, stored)[0]):
            bucket.delete([name])
            raise InputFailed(f"{folder / name} did not arrive as it was sent: run again")
        return shard


def _make_shard(path: Path, listing: Listing) -> Shard:
    if path.exists():
        return _read_back(path, listing)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        _write(partial, listing)
        shard = _read_back(partial, listing)
    except BaseException:
        partial.unlink(missing_ok=True)  # incomplete files must not fill the disk
        raise
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)
    return dataclasses.replace(shard, file=path.name)


@contextlib.contextmanager
def _fetched(folder: BucketUrl, name: str) -> Iterator[tuple[Path, StoredObject | None]]:
    """A copy of a file in a bucket in a folder that is deleted afterwards, and what the store says about the file; None
    and no copy if there is no such file. Messages of errors name the file in the bucket."""
    bucket = ObjectFolder(folder)
    with tempfile.TemporaryDirectory(prefix="nfnet_flax-") as scratch:
        path = Path(scratch, name)
        about = None
        with failing(), contextlib.suppress(FileNotFoundError):
            about = bucket.object(name)
            bucket.download(name, path)
        try:
            yield path, about
        except (ConfigError, InputFailed) as error:
            raise type(error)(str(error).replace(str(path), str(folder / name))) from error


def _write(path: Path, listing: Listing) -> None:
    with _writing(path):
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for index in range(len(listing)):
        record = encode_record(_read(listing, index))
        with _writing(path):
            writer.write(record)
    with _writing(path):
        writer.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the only error that the writer raises
        name, folder = str(path).removesuffix(PARTIAL_SUFFIX), str(path.parent)
        raise ConfigError(
            f"{name!r} cannot be written: {error}: make room in {folder!r}, or give another --out (for a bucket: "
            "another TMPDIR)"
        ) from error


def _read(listing: Listing, index: int) -> Example:
    try:
        return listing.read(index)
    except OSError as error:
        raise InputFailed(f"{listing.name(index)} in {str(listing.container)!r} cannot be read: {error}") from error


def _read_back(path: Path, listing: Listing) -> Shard:
    records = open_records({str(path): len(listing)})
    for index in range(len(listing)):
        try:
            example = decode_record(read_record(records, index, str(path)), check=True)
        except CorruptRecordError as error:
            raise ConfigError(f"{path} record {index} is damaged ({error}): delete the file, and run again") from error
        except OSError as error:
            raise InputFailed(f"{path} cannot be read back: {error}") from error
        found = (example.label, example.name, len(example.image))
        if found != (listing.labels[index], listing.name(index), listing.sizes[index]):
            raise ConfigError(
                f"{path} record {index} is {example.name} of {len(example.image)} bytes, not {listing.name(index)} of "
                f"{listing.sizes[index]}: delete the file, and run again"
            )
    return Shard(
        file=path.name,
        num_records=len(listing),
        num_bytes=path.stat().st_size,
        blake2b=_file_digest(path),
        ends_blake2b=ends_digest(path),
    )


def check_shard(folder: Place, shard: Shard, class_names: tuple[str, ...]) -> list[str]:
    """Compares a file with its manifest and decodes every image in it, as training does.

    Returns:
      One line per problem, with what to do about it; empty if there is none.
    """
    if isinstance(folder, Path):
        return _check_file(folder / shard.file, shard, class_names)
    place = folder / shard.file
    try:
        with _fetched(folder, shard.file) as (path, _):
            return [line.replace(str(path), str(place)) for line in _check_file(path, shard, class_names)]
    except OSError as error:
        return [f"{place} cannot be read ({error}): it was not checked"]


def _check_file(path: Path, shard: Shard, class_names: tuple[str, ...]) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing: copy it, or {_AGAIN}"]
    try:
        problems = list(_problems(path, shard, class_names))
        if not problems and _file_digest(path) != shard.blake2b:
            problems.append(f"{path} was changed outside its records (its BLAKE2b differs): delete it, and {_AGAIN}")
    except OSError as error:
        return [f"{path} cannot be read ({error}): it was not checked"]
    return problems


def _problems(path: Path, shard: Shard, class_names: tuple[str, ...]) -> Iterator[str]:
    if (size := path.stat().st_size) != shard.num_bytes:
        yield f"{path} has {size} bytes, not {shard.num_bytes}: delete it, and {_AGAIN}"
    records = open_records({str(path): shard.num_records})
    for index in range(shard.num_records):
        try:
            example = decode_record(read_record(records, index, str(path)), check=True)
        except CorruptRecordError as error:
            yield f"{path} record {index} is damaged ({error}): delete the file, and {_AGAIN}"
            continue
        if (wrong := contradiction(example, class_names)) is not None:
            yield f"{path} record {index}: {wrong}; delete the file, and {_AGAIN}"
        try:
            decode(example.image)
        except CorruptImageError as error:
            yield (
                f"{path} record {index} ({example.name}) does not decode: {error}; replace it in what the set is made "
                "from, or train with --data.on-corrupt skip"
            )


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


def _start_worker() -> None:
    """Runs first in each worker: makes it ignore Ctrl-C, and end when the main process ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def worker_pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for these functions.

    Raises:
      ConfigError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise ConfigError(
                "a worker process died, perhaps because it ran out of memory: use a smaller --num-processes"
            ) from error
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()  # otherwise their shards would be finished first, which takes minutes
            raise
        except BaseException:
            # Waits for shards that were begun. Without waiting, the end of Python and the end of the pool race: Python
            # writes to a pipe that the pool has closed, and a traceback follows the message.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
