"""Records in buckets are read whatever happens to the store, the copies, and the processes that make them."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import to_json
from nfnet_flax.data import copying, pipeline
from nfnet_flax.data.array_record_source import ArrayRecordSource
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.random_access import begin_copying
from nfnet_flax.data.sources import open_source
from nfnet_flax.json_files import StorageFailed, write_json
from nfnet_flax.storage.cache import DamagedObject, ObjectCache, Wanted
from nfnet_flax.storage.cache_room import CacheRoom
from nfnet_flax.storage.objects import ObjectFolder
from tests import image_sets, stores
from tests.bucket_sets import NAME, Bucket, copied, records, shards_of, wait_until


def test_faults_of_the_store_pass(bucket: Bucket, tmp_path: Path) -> None:
    whole = records(open_source(bucket.local_source(), "train", 0))
    source = open_source(bucket.source(tmp_path), "train", 0)
    cut: dict[str, object] = {"do": "truncate", "bytes": 1000, "times": 2, "method": "GET", "url": "array_record"}
    bucket.set_rules([cut])
    assert records(source) == whole
    for rule in (cut, {"do": "status", "status": 503, "times": 1, "method": "GET"}):
        bucket.set_rules([rule])
        for shard in shards_of(source):
            path = copied(shards_of(source), shard)
            assert path.read_bytes() == (bucket.local / Path(shard).name).read_bytes()
            path.unlink()


def test_an_object_that_was_replaced_is_refused_by_name(bucket: Bucket, tmp_path: Path) -> None:
    sources = [open_source(bucket.source(tmp_path / "cache", room), "train", 0) for room in (0, None)]
    held = open_source(bucket.source(tmp_path / "cache"), "eval", 0)
    content = (bucket.local / NAME).read_bytes()
    bucket.folder.put(NAME, content)  # the same bytes: nothing has changed
    assert records(sources[0]) == records(open_source(bucket.local_source(), "train", 0))
    bucket.folder.put(NAME, bytes(reversed(content)))
    refused = f"{NAME} has been replaced since it was opened"
    with pytest.raises(ConfigError, match=refused):
        sources[0][12]
    with pytest.raises(ConfigError, match=refused):
        copied(shards_of(sources[1]), f"{bucket.url}/{NAME}")
    config = DataConfig(source=bucket.source(tmp_path / "cache"), batch_size=12, image_size=16, num_threads=1)
    share = {"process_index": 0, "num_processes": 1}
    with (
        pipeline.train_batches(config, sources[1], seed=0, start_step=0, num_steps=99, **share) as found,
        pytest.raises(ConfigError, match=refused),
    ):
        list(found)
    assert not list((tmp_path / "cache").glob(f"*/*{NAME}"))
    bucket.folder.delete([NAME])
    with pytest.raises(ConfigError, match=f"{NAME} has been deleted"):
        sources[0][12]
    assert len(records(held)) == 6


READ = """
import contextlib, sys
from pathlib import Path
from nfnet_flax.config_json import from_json
from nfnet_flax.data.source_config import SourceConfig
import json
source = from_json(SourceConfig, json.loads(sys.argv[1])).open("train", 0)
print("opened", flush=True)
sys.stdin.readline()
with contextlib.ExitStack() as held:
    for shard in source._records.shards:
        print(held.enter_context(source._records.shards.held(shard)), flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def reader(config: ArrayRecordSource) -> Iterator[subprocess.Popen[str]]:
    """A process that opens the training split; at each further line of its input it goes on."""
    command = [sys.executable, "-W", "error", "-c", READ, json.dumps(to_json(config))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def test_each_byte_is_fetched_once_and_killed_processes_block_nobody(bucket: Bucket, tmp_path: Path) -> None:
    config = bucket.source(tmp_path)
    with reader(config) as first, reader(config) as second:
        names = sorted(path.name for path in bucket.local.glob("train-*"))
        before = {name: len(bucket.requests(name)) for name in names}
        bucket.set_rules([{"do": "slow", "seconds": 0.2, "method": "GET"}])
        go_on(first)
        go_on(second)
        assert lines(first, 3) == lines(second, 3)
        assert [len(bucket.requests(name)) - before[name] for name in names] == [1, 1, 1]

    config = bucket.source(tmp_path / "killed")
    with reader(config) as first, reader(config) as second:
        bucket.set_rules([{"do": "hang", "method": "GET", "times": 1}])
        go_on(first)
        wait_until(lambda: any(entry[6] == "hang" for entry in stores.requests_seen(bucket.proxy)))
        assert list((tmp_path / "killed").glob("*/*.partial"))
        go_on(second)
        first.send_signal(signal.SIGKILL)
        found = lines(second, 3)
    assert [Path(path).read_bytes() for path in found] == [(bucket.local / name).read_bytes() for name in names]
    assert not list((tmp_path / "killed").glob("*/*.partial"))


def test_without_room_records_are_read_directly(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = records(open_source(bucket.local_source(), "train", 0))
    size = (bucket.local / NAME).stat().st_size
    source = open_source(bucket.source(tmp_path / "small", 1.5 * size / 2**30), "train", 0)
    stop = begin_copying(source, range(len(source)))
    wait_until(lambda: "no room" in capsys.readouterr().err)
    wait_until(lambda: any((tmp_path / "small").glob("*/*.array_record")))  # another thread may still copy it
    stop()
    assert records(source) == whole
    assert len(list((tmp_path / "small").glob("*/*.array_record"))) == 1
    assert source.copies().num_missing == 2  # type: ignore[attr-defined]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source = open_source(bucket.source(tmp_path / "full"), "train", 0)
    with pytest.raises(ConfigError, match=rf"no room for it in {tmp_path}/full \(.* are free.*cache-dir"):
        copied(shards_of(source), f"{bucket.url}/{NAME}")
    assert records(source) == whole
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    source = open_source(bucket.source(blocked), "train", 0)
    stop = begin_copying(source, range(len(source)))
    wait_until(lambda: "shards cannot be copied" in capsys.readouterr().err)
    stop()
    assert records(source) == whole


def test_copies_that_nobody_uses_make_room(bucket: Bucket, tmp_path: Path) -> None:
    names = sorted(path.name for path in bucket.local.glob("train-*"))
    size = sum((bucket.local / name).stat().st_size for name in names)
    config = bucket.source(tmp_path, 1.1 * size / 2**30)
    held_out = shards_of(open_source(config, "eval", 0))
    with reader(config) as process:
        go_on(process)
        lines(process, 3)
        with pytest.raises(ConfigError, match="no room"):
            copied(held_out, next(iter(held_out)))
    for shard in held_out:  # the process has ended, by a kill
        copied(held_out, shard)
    left = {path.name.partition("-")[2] for path in tmp_path.glob("*/*.array_record")}
    assert {f"eval-0000{number}-of-00002.array_record" for number in (0, 1)} <= left
    assert len(left) < 5
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.array_record")) <= 1.1 * size


def test_making_room_leaves_files_alone_that_are_just_written(tmp_path: Path) -> None:
    folder, room = tmp_path / "copies" / "of a bucket", CacheRoom(tmp_path / "copies", 3)
    folder.mkdir(parents=True)

    def write() -> None:
        for number in range(300):
            write_json(folder / "2-new.json", {"number": number})

    with ThreadPoolExecutor(1) as thread:
        written = thread.submit(write)
        while not written.done():
            (folder / "1-old").write_bytes(b"old")
            assert room.reserve(folder / "2-new.partial", 3)
            assert not (folder / "1-old").exists()
    written.result()


def test_damaged_and_old_copies_are_replaced(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = records(open_source(bucket.local_source(), "train", 0))
    config, shard = bucket.source(tmp_path / "cache"), f"{bucket.url}/{NAME}"
    path = copied(shards_of(open_source(config, "train", 0)), shard)
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[1000] ^= 1
    for content, same_time in ((good[:-1], True), (bytes(damaged), False), (bytes(damaged), True)):
        about = path.stat()
        path.write_bytes(content)
        if same_time:
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        source = open_source(config, "train", 0)
        assert records(source) == whole
        if same_time and len(content) == len(good):
            assert f"{path} is damaged, and is copied again" in capsys.readouterr().err
            wait_until(path.exists)
        assert copied(shards_of(source), shard).read_bytes() == good
    path.with_name(f"{path.name}.json").unlink()
    assert copied(shards_of(open_source(config, "train", 0)), shard).read_bytes() == good

    other = tmp_path / "other"
    image_sets.make_folder(other / "folder", num_train=11)
    image_sets.prepare(other / "set", f"--folder={other / 'folder'}", "--num-processes=1")
    for found in (other / "set").glob("[a-z]*"):
        bucket.folder.upload(found, found.name)
    source = open_source(config, "train", 0)
    assert copied(shards_of(source), shard).read_bytes() == (other / "set" / NAME).read_bytes()
    assert records(source) == records(
        open_source(ArrayRecordSource(train=(f"{other}/set/train-*",), eval=("x",)), "train", 0)
    )


def test_copying_goes_on_after_the_store_failed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(copying, "_PAUSE_S", 0.2)
    source = open_source(bucket.source(tmp_path), "train", 0)
    bucket.set_rules([{"do": "status", "status": 403, "times": 2, "method": "GET", "url": NAME}])
    stop = begin_copying(source, range(len(source)))
    wait_until(lambda: source.copies().num_missing == 0)  # type: ignore[attr-defined]
    stop()
    assert "permission is missing" in capsys.readouterr().err


def test_copies_are_made_in_the_order_of_the_batches(bucket: Bucket, tmp_path: Path) -> None:
    shards = shards_of(open_source(bucket.source(tmp_path), "train", 0))
    names = list(shards)
    order = copying.Copying(shards, itertools.chain([names[2], names[2], names[0]]))
    assert [order._next(), order._next(), order._next()] == [names[2], names[0], None]
    long = copying.Copying(shards, itertools.chain([names[1]], itertools.repeat(names[0])))
    assert [long._next(), long._next(), long._next()] == [names[1], names[0], names[2]]


def test_a_shard_that_is_not_the_one_of_the_manifest_is_refused(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bucket.local / "train.json").read_text())
    manifest["shards"][1]["blake2b"] = manifest["shards"][0]["blake2b"]  # what lies between the ends may differ
    bucket.folder.put("train.json", json.dumps(manifest).encode())
    source = open_source(bucket.source(tmp_path), "train", 0)
    stop = begin_copying(source, range(len(source)))
    wait_until(lambda: f"{NAME} is not the file that its manifest describes" in capsys.readouterr().err)
    stop()
    with pytest.raises(ConfigError, match="its BLAKE2b differs"):
        records(source)


def test_checksums_of_every_kind(bucket: Bucket, tmp_path: Path) -> None:
    cache, content = ObjectCache(tmp_path / "cache", None), os.urandom(36_000_000)
    (tmp_path / "large").write_bytes(content)
    bucket.folder.upload(tmp_path / "large", "large")  # in parts: S3 then says no checksum of the whole
    folder, url = ObjectFolder(bucket.folder.url), bucket.folder.url / "large"
    try:
        about = folder.object("large")
        assert about.checksum.partition(":")[0] == {"gs": "md5", "s3": "etag"}[bucket.kind]
        good = hashlib.blake2b(content).hexdigest()
        crc32c = google_crc32c.Checksum(content).digest().hex()
        for wanted in (
            Wanted(url, about),
            Wanted(url, about, good),
            Wanted(url, dataclasses.replace(about, checksum=f"crc32c:{crc32c}")),
        ):
            cache.discard(wanted)
            assert cache.fetch(wanted) == "there"
            path = cache.copy(wanted)
            assert path is not None
            assert path.read_bytes() == content
        cache.discard(Wanted(url, about))
        with pytest.raises(DamagedObject, match="its BLAKE2b differs"):
            cache.fetch(Wanted(url, about, hashlib.blake2b(b"other").hexdigest()))
        other = Wanted(url, dataclasses.replace(about, checksum=f"md5:{'0' * 32}"))
        if bucket.kind == "s3":  # as of an object that is encrypted by a key of KMS
            assert cache.fetch(other) == "there"
        else:
            with pytest.raises(StorageFailed, match="another checksum than the store says"):
                cache.fetch(other)
    finally:
        bucket.folder.delete(["large"])
