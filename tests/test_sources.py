"""The sets of images: the same records from every kind of storage, in any process, and errors that say what to do."""

import dataclasses
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import from_json, to_json
from nfnet_flax.data.random_access import ArraySource, CorruptRecordError, Source, Split, split_off
from nfnet_flax.data.source_config import (
    ArrayRecordSource,
    FolderSource,
    SourceConfig,
    SyntheticSource,
    TfdsSource,
)
from nfnet_flax.data.sources import open_source
from tests import runs
from tests.image_sets import CLASSES, WITHOUT_TENSORFLOW, config_of, copied, image_file, make_folder

SIZE = 16
SPLITS: tuple[Split, ...] = ("train", "eval")
STORED = ("folder", "array_record", "tfds", "parquet", "webdataset")
KINDS = (*STORED, "digits", "synthetic")


def records(source: Source) -> list[tuple[bytes, int]]:
    return [(bytes(record["image"]), int(record["label"])) for record in (source[i] for i in range(len(source)))]


def records_digest(source: Source) -> str:
    return hashlib.sha256(repr(records(source)).encode()).hexdigest()


@pytest.mark.parametrize("split", SPLITS)
def test_every_storage_gives_the_same_bytes(sets: Path, split: Split) -> None:
    files = {
        path.read_bytes(): CLASSES.index(path.parent.name)
        for path in (sets / "folder" / ("train" if split == "train" else "val")).glob("*/*")
    }
    found = {kind: open_source(config_of(kind, sets), split, SIZE) for kind in STORED}
    for kind, source in found.items():
        assert source.class_names == CLASSES, kind
        assert records(source) == records(found["folder"]), kind
        assert isinstance(source[0]["image"], bytes)
        assert isinstance(source[0]["label"], np.int32)
        assert dict(records(source)) == files
        assert len(source) == len(files)
    names = [f"{path.parent.name}/{path.name}" for path in map(Path, map(found["folder"].describe, range(len(files))))]
    assert names == sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())


READ_WITHOUT_TENSORFLOW = (
    WITHOUT_TENSORFLOW
    + """
import importlib.util
assert importlib.util.find_spec("tensorflow") is None
from nfnet_flax.data.random_access import Split
from nfnet_flax.data.source_config import TfdsSource
from nfnet_flax.data.sources import open_source
from tests.test_sources import records_digest

for split in ("train", "train[:50%]", "train[10:]"):
    source = open_source(TfdsSource(name="tiny_set", data_dir=sys.argv[1], train_split=split), "train", 0)
    print(records_digest(source))
assert "tensorflow" not in sys.modules
"""
)


def test_training_starts_with_the_same_loss_from_each_storage(sets: Path, tmp_path: Path) -> None:
    text = runs.DIGITS.read_text()
    imports = "from nfnet_flax.data.augment_config import CropAugment\nfrom nfnet_flax.data.source_config import *"
    options = [*runs.OPTIONS, *runs.SMALL, "--num-steps=1", "--log-every-steps=1", "--data.batch-size=8"]
    words = [word for option in options for word in option.replace("=", " ").split(" ")]
    rows = []
    for kind in STORED:
        recipe = tmp_path / f"{kind}.py"
        changed = text.replace("source=DigitsSource()", f"source={config_of(kind, sets)}, augment=CropAugment()")
        recipe.write_text(changed.replace("from nfnet_flax.data.source_config import DigitsSource", imports))
        assert cli.main(["train", str(recipe), "--workdir", str(tmp_path / kind), *words]) == exit_codes.EXIT_DONE
        rows.append(json.loads((tmp_path / kind / "metrics.jsonl").read_text()))
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/num_examples"):
        assert len({row[name] for row in rows}) == 1, name
    assert np.isfinite(rows[0]["train/loss"])


def test_tfds_needs_no_tensorflow_and_takes_parts_of_splits(sets: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", READ_WITHOUT_TENSORFLOW, str(sets / "tfds")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    folder = open_source(config_of("folder", sets), "train", SIZE)
    parts = [folder, split_off(folder, 0, 6), split_off(folder, 10, 12)]
    assert done.stdout.split() == [records_digest(part) for part in parts]


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_outside_raises(sets: Path, kind: str) -> None:
    source = open_source(config_of(kind, sets), "eval", SIZE)
    for wrong in (-1, len(source), 10**9):
        for read in (source.__getitem__, source.describe, split_off(source, 1, len(source)).__getitem__):
            with pytest.raises(IndexError, match=f"index {wrong} of a set of"):
                read(wrong)
    position: Any = np.int64(0)  # what Grain and NumPy hand over
    assert source[position]["label"] == source[0]["label"]


READ_PICKLES = """
import pickle, sys
from tests.test_sources import records_digest

for path in sys.argv[1:]:
    with open(path, "rb") as file:
        source = pickle.load(file)
    print(records_digest(source), source.fingerprint())
"""


def test_sources_travel_to_other_processes(sets: Path, tmp_path: Path) -> None:
    wanted = []
    for kind in KINDS:
        whole = open_source(config_of(kind, sets), "eval", SIZE)
        source = split_off(whole, 1, len(whole))
        wanted.append(f"{records_digest(source)} {source.fingerprint()}")  # files are open when it is pickled
        (tmp_path / kind).write_bytes(pickle.dumps(source))
    command = [sys.executable, "-W", "error", "-c", READ_PICKLES, *(str(tmp_path / kind) for kind in KINDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_threads_read_the_same(sets: Path, kind: str) -> None:
    source = open_source(config_of(kind, sets), "eval", SIZE)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda index: bytes(source[index % len(source)]["image"]), range(200)))
    assert found == [records(source)[index % len(source)][0] for index in range(200)]


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_tell_sets_apart(sets: Path, kind: str) -> None:
    config = config_of(kind, sets)
    train, held_out = (open_source(config, split, SIZE) for split in SPLITS)
    parts = [train, held_out, *(split_off(train, start, stop) for start, stop in ((0, 2), (1, 3), (0, 3)))]
    prints = [source.fingerprint() for source in parts]
    assert len(set(prints)) == len(prints)
    assert all(int(text, 16) for text in prints)
    assert open_source(config, "train", SIZE).fingerprint() == prints[0]


def test_a_fingerprint_follows_the_set_not_its_place(sets: Path, tmp_path: Path) -> None:
    folder = copied("folder", sets, tmp_path)
    moved = FolderSource(root=str(folder))
    here = open_source(config_of("folder", sets), "train", SIZE).fingerprint()
    assert open_source(moved, "train", SIZE).fingerprint() == here
    (folder / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG").rename(folder / "train" / CLASSES[1] / "x.JPEG")
    assert open_source(moved, "train", SIZE).fingerprint() != here


@pytest.mark.parametrize("kind", KINDS)
def test_configs_survive_json(sets: Path, kind: str) -> None:
    config = config_of(kind, sets)
    assert from_json(SourceConfig, json.loads(json.dumps(to_json(config)))) == config


def test_examples_are_named(sets: Path) -> None:
    names = [open_source(config_of(kind, sets), "train", SIZE).describe(5) for kind in KINDS]
    assert Path(names[0]).is_file()
    assert names[1] == f"{sets}/array_record/train-00001-of-00003.array_record record 1"
    assert names[2] == f"{sets}/tfds/tiny_set/1.0.0/tiny_set-train.array_record-00000-of-00001 record 5"
    assert re.fullmatch(
        rf"{sets}/parquet/data/train-0000\d-of-00003\.parquet row \d \({Path(names[0]).name}\)", names[3]
    )
    assert re.fullmatch(rf"{sets}/webdataset/tiny-train-000\d\.tar member {Path(names[0]).name}", names[4])
    assert names[5:] == ["image 5 of 1437 in memory", "synthetic image 5"]
    part = open_source(TfdsSource(name="tiny_set", data_dir=str(sets / "tfds"), train_split="train[4:]"), "train", SIZE)
    assert part.describe(5).endswith(" record 9")


def test_the_first_examples_are_of_mixed_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "folder", num_train=100)
    source = open_source(FolderSource(root=str(tmp_path / "folder")), "train", SIZE)
    held_out, rest = split_off(source, 0, 60), split_off(source, 60, 300)
    assert records(held_out) + records(rest) == records(source)
    counts = Counter(label for _, label in records(held_out))
    assert sorted(counts) == [0, 1, 2]
    assert min(counts.values()) >= 10
    for start, stop in ((0, 0), (3, 2), (-1, 2), (0, 301)):
        with pytest.raises(ConfigError, match=f"{start}:{stop}.*within the 300 examples"):
            split_off(source, start, stop)


def test_a_folder_may_hold_other_files(sets: Path, tmp_path: Path) -> None:
    root = copied("folder", sets, tmp_path)
    before = open_source(config_of("folder", sets), "train", SIZE)
    inside = root / "train" / CLASSES[0]
    for name in (".hidden.jpg", "._x.JPEG", "notes.txt", "jpg"):
        (inside / name).write_bytes(b"")
        (root / "train" / name).write_bytes(b"")
    (root / "train" / ".cache").mkdir()
    (inside / "folder.jpg").mkdir()
    shutil.rmtree(root / "val" / CLASSES[1])  # labels stay those of the training split
    source = open_source(FolderSource(root=str(root)), "train", SIZE)
    assert source.fingerprint() == before.fingerprint()
    held_out = open_source(FolderSource(root=str(root)), "eval", SIZE)
    assert {label for _, label in records(held_out)} == {0, 2}
    for name in ("upper.PNG", "a.webp", "ü.jpeg"):
        (inside / name).write_bytes(image_file(1))
    assert len(open_source(FolderSource(root=str(root)), "train", SIZE)) == len(source) + 3


def test_synthetic_images_are_fixed_and_cost_nothing() -> None:
    config = SyntheticSource(num_train_examples=10_000, num_eval_examples=10, num_classes=7)
    source = open_source(config, "train", SIZE)
    images = [source[index]["image"] for index in range(4096)]
    assert images[0].shape == (SIZE, SIZE, 3)
    assert images[0].dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 4096
    assert all(np.shares_memory(images[index], image) for index, image in ((0, images[0]), (9, source[9]["image"])))
    assert [int(source[index]["label"]) for index in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert not np.array_equal(images[0], open_source(config, "eval", SIZE)[0]["image"])
    with pytest.raises(ValueError, match="read-only"):
        images[0][0, 0, 0] = 1
    assert len(pickle.dumps(source)) < 1000


@pytest.mark.parametrize("kind", ["array_record", "tfds"])
def test_a_damaged_record_is_named(sets: Path, tmp_path: Path, kind: str) -> None:
    copied(kind, sets, tmp_path)
    intact = records(open_source(config_of(kind, sets), "train", SIZE))
    source = open_source(config_of(kind, tmp_path), "train", SIZE)
    path = Path(source.describe(0).split(" record ")[0])
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    damaged = {}
    for index, (image, label) in enumerate(intact):
        try:
            assert (source[index]["image"], source[index]["label"]) == (image, label)
        except CorruptRecordError as error:
            damaged[index] = str(error)
    assert len(damaged) == 1
    index, message = damaged.popitem()
    assert message.startswith(f"{path} record {index} is damaged: ")


def test_folders_without_images_or_classes(tmp_path: Path) -> None:
    def message(root: Path, split: Split = "train") -> str:
        with pytest.raises(ConfigError) as error:
            open_source(FolderSource(root=str(root)), split, SIZE)
        return str(error.value)

    assert "missing/train' does not exist: expected are image files in one folder" in message(tmp_path / "missing")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "train" / "a.jpg").write_bytes(image_file(0))
    assert "has no class folder" in message(tmp_path / "flat")
    (tmp_path / "flat" / "train" / "cat").mkdir()
    assert "train/cat' has no image in it" in message(tmp_path / "flat")
    (tmp_path / "flat" / "train" / "a.jpg").rename(tmp_path / "flat" / "train" / "cat" / "a.jpg")
    assert "only one class, 'cat': nothing can be learned" in message(tmp_path / "flat")
    root = make_folder(tmp_path / "images")
    (root / "train" / "empty").mkdir()
    assert "train/empty' has no image in it" in message(root)
    (root / "train" / "empty").rmdir()
    (root / "val" / "stray").mkdir()
    (root / "val" / "stray" / "a.jpg").write_bytes(image_file(0))
    assert "eval split: class 'stray' is unknown (1 of the 4 classes" in message(root, "eval")
    shutil.rmtree(root / "val")
    assert "val' does not exist" in message(root, "eval")


def test_array_records_that_are_incomplete(sets: Path, tmp_path: Path) -> None:
    folder = copied("array_record", sets, tmp_path)

    def message(*patterns: str) -> str:
        with pytest.raises(ConfigError) as error:
            open_source(
                ArrayRecordSource(train=tuple(f"{folder}/{name}" for name in patterns), eval=("x",)), "train", 0
            )
        return str(error.value)

    assert "no file matches" in message("nothing-*")
    assert "tools/prepare_imagenet.py" in message("nothing-*")
    assert "not named like a shard" in message("*")
    one = ArrayRecordSource(train=(f"{folder}/train-00001-of-00003.array_record",), eval=("x",))
    whole = records(open_source(config_of("array_record", sets), "train", 0))
    assert records(open_source(one, "train", 0)) == whole[4:8]  # a list of files may leave some out, a pattern may not
    assert [found.num_files for found in open_source(one, "train", 0).unused] == [2]
    (folder / "train-00001-of-00003.array_record").rename(tmp_path / "kept")
    assert "1 of the 3 shards" in message("train-*")
    assert "such as train-00001-of-00003.array_record" in message("train-*")
    (folder / "train-00001-of-00003.array_record").write_bytes((tmp_path / "kept").read_bytes()[:-1])
    assert "bytes, not the" in message("train-*")
    (folder / "train-00000-of-00009.array_record").write_bytes(b"")
    assert "not listed in the manifest" in message("train-*")
    (folder / "train.json").write_text("{")
    assert "is damaged" in message("train-*")
    (folder / "train.json").write_text("{}")
    assert "no manifest of format version 1" in message("train-*")
    (folder / "train.json").unlink()
    assert "the set is unfinished" in message("train-*")
    with pytest.raises(ConfigError, match=r"source\.train"):
        ArrayRecordSource(train=(), eval=("x",))


def test_tfds_sets_that_cannot_be_used(sets: Path, tmp_path: Path) -> None:
    place = copied("tfds", sets, tmp_path)
    config = TfdsSource(name="tiny_set", data_dir=str(place))

    def message(**changes: str) -> str:
        with pytest.raises(ConfigError) as error:
            open_source(dataclasses.replace(config, **changes), "train", 0)
        return str(error.value)

    for name in ("mnist", "tiny_set:2.0.0", "no such"):
        assert f"TFDS set {name!r} is not there" in message(name=name)
        assert 'file_format="array_record").download_and_prepare()' in message(name=name)
    assert "its splits are" in message(train_split="tarin")
    assert "source.train_split = 'train[':" in message(train_split="train[")
    assert "has no examples" in message(train_split="train[:0]")
    assert "incompatible with 12 examples" in message(train_split="train[50:]")
    assert "it has image (Image), label (ClassLabel)" in message(image_key="picture")
    assert "source.label_key = 'image': TFDS set 'tiny_set' has no such ClassLabel" in message(label_key="image")
    unlabelled = open_source(dataclasses.replace(config, eval_split="test"), "eval", 0)
    with pytest.raises(ConfigError, match="has label -1: choose a split with labels"):
        unlabelled[0]

    (place / "tiny_set" / "1.0.0" / "tiny_set-train.array_record-00000-of-00001").unlink()
    assert "1 of 1 files are missing" in message()
    info = place / "tiny_set" / "1.0.0" / "dataset_info.json"
    text = info.read_text()
    assert '"fileFormat": "array_record"' in text
    info.write_text(text.replace('"array_record"', '"tfrecord"'))
    assert "is prepared as tfrecord, which has no random access" in message()


def test_digits_that_no_memory_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_image_size = 60000: 360 digits of 60000 px take 5\.9 TiB"):
        open_source(config_of("digits", Path()), "eval", 60_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSource(SourceConfig):
    """As users write one; its last label is of no class."""

    last: int

    def open(self, split: Split, image_size: int) -> Source:
        labels = np.array([0, 1, self.last], np.int32)
        return ArraySource(images=np.zeros((3, image_size, image_size, 3), np.uint8), labels=labels, names=("a", "b"))


@pytest.mark.parametrize("last", [2, -1])
def test_a_label_of_no_class_is_named_when_its_example_is_read(last: int) -> None:
    assert records(open_source(OwnSource(last=1), "train", 4))[-1][1] == 1
    source = open_source(OwnSource(last=last), "train", 4)
    assert int(source[1]["label"]) == 1
    with pytest.raises(ConfigError, match=rf"label = {last}: of image 2 of 3 in memory: must be .* from 0 to 1"):
        source[2]
