"""Sets in buckets give the batches of the same files on a disk; the tool and the doctor know buckets."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import from_json, to_json
from nfnet_flax.data import pipeline
from nfnet_flax.data.array_record_source import ArrayRecordSource
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.data.source_config import SourceConfig
from nfnet_flax.data.sources import open_source
from nfnet_flax.doctor.data import check_data
from nfnet_flax.doctor.findings import Finding
from nfnet_flax.open_config import with_absolute_places
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.storage import BucketFolder, BucketUrl
from tests import runs, stores
from tests.bucket_sets import NAME, Bucket, batches, identity_of, records
from tools import prepare_imagenet


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
    assert identity_of(on_disk) == identity_of(config)


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
