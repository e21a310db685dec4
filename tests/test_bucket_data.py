"""Sets in buckets give the batches of the same files on a disk, whatever happens to the store, the copies and the
processes that make them."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import from_json, to_json
from nfnet_flax.data import bucket_shards, pipeline
from nfnet_flax.data.array_record_source import ArrayRecords, ArrayRecordSource
from nfnet_flax.data.bucket_records import BucketRecords
from nfnet_flax.data.bucket_shards import BucketShards
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.data.source_config import SourceConfig
from nfnet_flax.data.sources import open_source
from nfnet_flax.doctor.data import check_data
from nfnet_flax.doctor.findings import Finding
from nfnet_flax.open_config import with_absolute_places
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.storage import BucketFolder, BucketUrl
from nfnet_flax.storage.objects import ObjectFolder
from tests import image_sets, runs, stores
from tools import prepare_imagenet

NAME = "train-00001-of-00003.array_record"


class Bucket(NamedTuple):
    """A set in a bucket, and the same files on a disk."""

    kind: str
    url: str
    """URL of the set."""
    proxy: str
    local: Path
    set_rules: Callable[[list[dict[str, object]]], None]

    @property
    def folder(self) -> BucketFolder:
        return BucketFolder(BucketUrl(self.kind, stores.BUCKET, self.url.split("/", 3)[3]))

    def fill(self) -> None:
        """Writes the set, which a test has changed, again."""
        for path in self.local.glob("[a-z]*"):
            self.folder.upload(path, path.name)

    def source(self, cache: Path, cache_gib: float | None = None) -> ArrayRecordSource:
        place = f"{self.url}/"
        return ArrayRecordSource(
            train=(f"{place}train-*",), eval=(f"{place}eval-*",), cache_dir=str(cache), cache_gib=cache_gib
        )

    def local_source(self) -> ArrayRecordSource:
        return ArrayRecordSource(train=(f"{self.local}/train-*",), eval=(f"{self.local}/eval-*",))

    def requests(self, name: str) -> list[list[object]]:
        """The requests for the content of an object."""
        log = stores.requests_seen(self.proxy)
        return [entry for entry in log if entry[1] == "GET" and name in str(entry[2]) and entry[3]]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    image_sets.make_folder(root / "folder", num_train=12)
    image_sets.prepare(root / "set", f"--folder={root / 'folder'}", "--num-processes=1")
    return root / "set"


@pytest.fixture(scope="module", params=stores.KINDS)
def served(request: pytest.FixtureRequest, local: Path) -> Iterator[Bucket]:
    with stores.proxied(request.param, []) as (proxy, set_rules), pytest.MonkeyPatch.context() as patch:
        stores.use(patch, request.param, proxy)
        found = Bucket(request.param, f"{request.param}://{stores.BUCKET}/data [v2]/set", proxy, local, set_rules)
        found.fill()
        yield found


@pytest.fixture
def bucket(served: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    stores.use(monkeypatch, served.kind, served.proxy)
    before = contents(served)
    yield served
    served.set_rules([])
    if contents(served) != before:
        served.fill()


def contents(served: Bucket) -> dict[str, str]:
    return {name: about.checksum for name, about in ObjectFolder(served.folder.url).objects().items()}


def records(source: object) -> list[tuple[bytes, int]]:
    assert isinstance(source, ArrayRecords)
    return [(record["image"], int(record["label"])) for record in map(source.__getitem__, range(len(source)))]


def shards_of(source: object) -> BucketShards:
    assert isinstance(source, ArrayRecords)
    assert isinstance(source._records, BucketRecords)
    return source._records.shards


def copied(shards: BucketShards, shard: str) -> Path:
    """The copy of a shard, made if necessary."""
    with shards.held(shard) as path:
        return path


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def batches(config: DataConfig, start: int, count: int, index: int, num_processes: int) -> list[dict[str, np.ndarray]]:
    source = pipeline.open_split(config, "train")
    share = {"process_index": index, "num_processes": num_processes}
    with pipeline.train_batches(config, source, seed=3, start_step=start, num_steps=start + count, **share) as found:
        return list(found)


def assert_equal(rows: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    assert rows.keys() == others.keys()
    for name, value in rows.items():
        assert np.array_equal(value, others[name]), name


def test_batches_and_identity_are_those_of_local_files(bucket: Bucket, tmp_path: Path) -> None:
    on_disk = DataConfig(source=bucket.local_source(), batch_size=8, image_size=16)
    wanted = [batches(on_disk, start, count, 0, 1) for start, count in ((0, 6), (1_000_000, 1))]
    for num_processes, room in ((1, 0.0), (2, 0.0), (4, 0.0), (2, None), (1, None)):  # without copies, and with
        config = dataclasses.replace(on_disk, source=bucket.source(tmp_path / "cache", room))
        for (start, count), steps in zip(((0, 6), (1_000_000, 1)), wanted, strict=True):
            parts = [batches(config, start, count, index, num_processes) for index in range(num_processes)]
            for step, found in zip(steps, zip(*parts, strict=True), strict=True):
                assert_equal(step, {name: np.concatenate([rows[name] for rows in found]) for name in step})
    in_workers = dataclasses.replace(on_disk, source=bucket.source(tmp_path / "workers"), num_workers=1)
    assert_equal(wanted[0][1], batches(in_workers, 1, 1, 0, 1)[0])
    copies = list((tmp_path / "cache").glob("*/*.array_record"))
    assert sorted(path.read_bytes() for path in copies) == sorted(
        path.read_bytes() for path in bucket.local.glob("train-*")
    )
    identities = [
        pipeline.input_identity(
            config,
            seed=0,
            train_source=pipeline.open_split(config, "train"),
            eval_source=pipeline.open_split(config, "eval"),
        )
        for config in (on_disk, config)
    ]
    assert identities[0] == identities[1]


def test_records_of_held_out_images_and_their_names(bucket: Bucket, tmp_path: Path) -> None:
    config = DataConfig(source=bucket.source(tmp_path / "cache"), num_held_out=5)
    parts = [pipeline.open_split(config, split) for split in ("eval", "train")]
    parts[0].read_ahead(range(5))  # type: ignore[attr-defined]
    whole = records(open_source(bucket.local_source(), "train", 0))
    assert [part[i]["image"] for part in parts for i in range(len(part))] == [image for image, _ in whole]
    assert parts[1].describe(8) == f"{bucket.url}/{NAME} record 1"
    config.source.check_splits()


def test_configs_with_urls_survive_json_and_stay_urls(tmp_path: Path) -> None:
    config = ArrayRecordSource(
        train=("gs://bkt/set/train-*",), eval=("s3://bkt/set/eval-*",), cache_dir="x", cache_gib=1.5
    )
    assert from_json(SourceConfig, json.loads(json.dumps(to_json(config)))) == config
    assert with_absolute_places(config) == dataclasses.replace(config, cache_dir=os.path.abspath("x"))
    assert to_json(config, places=False) == {"type": "ArrayRecordSource"}
    assert "cache" not in str(to_json(dataclasses.replace(config, cache_dir=None, cache_gib=None)))
    with pytest.raises(ConfigError, match=r"source\.cache_gib = -1"):
        dataclasses.replace(config, cache_gib=-1)
    with pytest.raises(ConfigError, match=r"source\.cache_dir = 'gs://b/x': is a URL"):
        dataclasses.replace(config, cache_dir="gs://b/x")


def test_incomplete_sets_are_named(bucket: Bucket, tmp_path: Path) -> None:
    def message(*patterns: str) -> str:
        with pytest.raises(ConfigError) as error:
            open_source(
                ArrayRecordSource(train=patterns, eval=(f"{bucket.url}/eval-*",), cache_dir=str(tmp_path)), "train", 0
            )
        return str(error.value)

    place = bucket.url
    assert "no file matches" in message(f"{place}/nothing-*")
    assert "no file matches" in message(f"{place}/nowhere/train-*")
    assert "not named like a shard" in message(f"{place}/*")
    assert "takes 2 shards of the held-out set" in message(f"{place}/eval-*")
    assert "gives both paths and URLs" in message(
        f"{place}/{NAME}", f"{bucket.local}/train-00000-of-00003.array_record"
    )
    one = ArrayRecordSource(train=(f"{place}/{NAME}",), eval=("x",), cache_dir=str(tmp_path))
    opened = open_source(one, "train", 0)
    assert [found.num_files for found in opened.unused] == [2]
    assert len(opened) == 12
    bucket.folder.delete([NAME])
    assert f"1 of the 3 shards listed in '{place}/train.json' are missing, such as {NAME}" in message(
        f"{place}/train-*"
    )
    content = (bucket.local / NAME).read_bytes()
    bucket.folder.put(NAME, content[:-1])
    assert f"{place}/{NAME} has {len(content) - 1} bytes, not the {len(content)} written" in message(f"{place}/train-*")
    bucket.folder.put(NAME, content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert f"{place}/{NAME} is not the file that the manifest beside it describes" in message(f"{place}/train-*")
    bucket.folder.put("train.json", b"{")
    assert f"{place}/train.json is damaged" in message(f"{place}/train-*")
    bucket.folder.delete(["train.json"])
    assert f"{place}/train.json does not exist: it is written last" in message(f"{place}/train-*")
    with pytest.raises(OSError, match="there is no bucket 'absent'"):
        message(f"{bucket.kind}://absent/train-*")


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
    stop = source.begin_copying(iter(range(len(source))))  # type: ignore[attr-defined]
    wait_until(lambda: "no room" in capsys.readouterr().err)
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
    stop = source.begin_copying(iter(range(len(source))))  # type: ignore[attr-defined]
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
    monkeypatch.setattr(bucket_shards, "_PAUSE_S", 0.2)
    source = open_source(bucket.source(tmp_path), "train", 0)
    bucket.set_rules([{"do": "status", "status": 403, "times": 2, "method": "GET", "url": NAME}])
    stop = source.begin_copying(iter(range(len(source))))  # type: ignore[attr-defined]
    wait_until(lambda: source.copies().num_missing == 0)  # type: ignore[attr-defined]
    stop()
    assert "permission is missing" in capsys.readouterr().err


def test_copies_are_made_in_the_order_of_the_batches(bucket: Bucket, tmp_path: Path) -> None:
    shards = shards_of(open_source(bucket.source(tmp_path), "train", 0))
    names = list(shards)
    order = bucket_shards._Copying(shards, itertools.chain([names[2], names[2], names[0]]))
    assert [order._next(), order._next(), order._next()] == [names[2], names[0], None]
    long = bucket_shards._Copying(shards, itertools.chain([names[1]], itertools.repeat(names[0])))
    assert [long._next(), long._next(), long._next()] == [names[1], names[0], names[2]]


def test_the_tool_writes_into_buckets_and_verifies_there(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("PYTHONPATH", runs.ROOT), ("TMPDIR", tmp_path)):  # of the tool's worker processes
        monkeypatch.setenv(name, str(value))
    out = f"{bucket.kind}://{stores.BUCKET}/made"
    options = prepare_imagenet.Options(
        out=out, folder=bucket.local.parent / "folder", expect_imagenet=False, verify=True, num_processes=1
    )
    options = dataclasses.replace(options, train_shards=3, eval_shards=2)
    folder = BucketFolder(BucketUrl(bucket.kind, stores.BUCKET, "made"))
    wanted = {path.name: path.read_bytes() for path in bucket.local.glob("[a-z]*")}
    prepare_imagenet.run(options)
    assert {name: folder.read(name) for name in folder.files()} == wanted
    folder.delete([NAME, "train.json"])  # as after a kill, which leaves the plan
    input_digest = json.loads(wanted["train.json"])["input_digest"]
    folder.put("train.plan.json", json.dumps({"input_digest": input_digest}).encode())
    prepare_imagenet.run(options)
    assert "train: 36 images to 3 shards, of which 2 exist" in capsys.readouterr().out
    assert {name: folder.read(name) for name in folder.files()} == wanted
    folder.put(NAME, wanted[NAME][:1000] + b"x" + wanted[NAME][1001:])
    folder.delete(["eval-00000-of-00002.array_record"])
    with pytest.raises(ConfigError) as error:
        prepare_imagenet.run(dataclasses.replace(options, folder=None))
    assert re.search(rf"{out}/{NAME} record 1 is damaged", str(error.value))
    assert f"{out}/eval-00000-of-00002.array_record is missing" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_doctor_reads_the_bucket_and_looks_for_room(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(cache_gib: float | None = None, url: str = bucket.url) -> list[Finding]:
        recipe = load_recipe(runs.DIGITS)
        source = dataclasses.replace(bucket.source(tmp_path / "cache", cache_gib), train=(f"{url}/train-*",))
        return check_data(dataclasses.replace(recipe, data=DataConfig(source=source)), None)

    texts = [finding.text for finding in found() if not finding.is_wrong]
    assert texts[0].startswith("train: 36 examples of 3 classes; the first is ")
    assert f"copies: 0 of 5 shards are in {tmp_path}/cache; the others have 640.0 KiB" in texts
    assert not [finding for finding in found(0.0001) if finding.is_wrong]
    assert any(
        finding.text.endswith("(cache_gib); what has no copy is read from the bucket, which is slower")
        for finding in found(0.0001)
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    wrong = [finding.text for finding in found() if finding.is_wrong]
    assert len(wrong) == 1
    assert wrong[0].startswith(
        f"copies: there is room for 0.0 KiB more in {tmp_path}/cache: make room, or give another"
    )
    with pytest.raises(InputFailed, match="there is no bucket 'absent'"):
        found(url=f"{bucket.kind}://absent")
    assert not (tmp_path / "cache").exists()
