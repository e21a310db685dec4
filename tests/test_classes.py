"""Labels mean class names, whatever the split: mapped by name for every kind of storage, or refused by name."""

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import input_identity, open_split
from nfnet_flax.data.random_access import Source, Split
from nfnet_flax.data.source_config import ArrayRecordSource, FolderSource, SourceConfig
from tests.image_sets import CLASSES, config_of, copied, image_file, prepare

KINDS = ("folder", "array_record", "tfds")


def data(source: SourceConfig, num_held_out: int | None = None) -> DataConfig:
    return DataConfig(source=source, num_held_out=num_held_out, image_size=8, eval_image_size=8)


def labels(source: Source) -> list[tuple[bytes, str]]:
    """Image and class name of every example."""
    records = [source[index] for index in range(len(source))]
    assert all(isinstance(record["label"], np.int32) for record in records)
    return [(bytes(record["image"]), source.class_names[record["label"]]) for record in records]


@pytest.mark.parametrize("kind", [*KINDS, "digits", "synthetic"])
@pytest.mark.parametrize("num_held_out", [None, 5])
def test_a_split_is_read_by_the_names_of_a_run(sets: Path, kind: str, num_held_out: int | None) -> None:
    config = data(config_of(kind, sets), num_held_out)
    for split in ("train", "eval"):
        own = open_split(config, split)
        names = ("a new class", *reversed(own.class_names))
        other = pickle.loads(pickle.dumps(open_split(config, split, names)))
        assert other.class_names == names
        assert labels(other) == labels(own)
        assert other.fingerprint() != own.fingerprint()
        assert other.describe(1) == own.describe(1)
        assert open_split(config, split, own.class_names).fingerprint() == own.fingerprint()
        with pytest.raises(ConfigError, match=rf"class '{own.class_names[0]}' is unknown \(1 of the"):
            open_split(config, split, own.class_names[1:])


def test_the_eval_folder_may_hold_one_class_and_need_no_training_images(sets: Path, tmp_path: Path) -> None:
    root = copied("folder", sets, tmp_path)
    for name in CLASSES[:2]:
        shutil.rmtree(root / "val" / name)
    config = data(FolderSource(root=str(root)))
    assert {name for _, name in labels(open_split(config, "eval"))} == {CLASSES[2]}
    assert int(open_split(config, "eval")[0]["label"]) == 2
    shutil.rmtree(root / "train")
    assert int(open_split(config, "eval", CLASSES)[0]["label"]) == 2
    prepared = tmp_path / "prepared"
    copied("folder", sets, tmp_path / "again")
    shutil.rmtree(root / "val")
    shutil.copytree(tmp_path / "again" / "folder" / "train", root / "train")
    shutil.copytree(tmp_path / "again" / "folder" / "val" / CLASSES[2], root / "val" / CLASSES[2])
    prepare(prepared, f"--folder={root}", "--num-processes=1")
    held_out = open_split(data(config_of_shards(prepared, prepared)), "eval")
    assert {int(held_out[index]["label"]) for index in range(len(held_out))} == {2}


def config_of_shards(train: Path, held_out: Path) -> ArrayRecordSource:
    return ArrayRecordSource(train=(f"{train}/train-*",), eval=(f"{held_out}/eval-*",))


def test_manifests_may_list_other_classes_in_another_order(sets: Path, tmp_path: Path) -> None:
    root = copied("folder", sets, tmp_path)
    for split in ("train", "val"):
        (root / split / CLASSES[0]).rename(root / split / "z_last")
    prepare(tmp_path / "shards", f"--folder={root}", "--num-processes=1")
    mixed = data(config_of_shards(tmp_path / "shards", sets / "array_record"))
    with pytest.raises(ConfigError, match=f"eval split: class '{CLASSES[0]}' is unknown"):
        open_split(mixed, "eval")
    shutil.rmtree(root / "val" / "z_last")
    shutil.rmtree(root / "train" / "z_last")
    prepare(tmp_path / "fewer", f"--folder={root}", "--num-processes=1")
    fewer = data(config_of_shards(sets / "array_record", tmp_path / "fewer"))
    held_out = open_split(fewer, "eval")
    assert held_out.class_names == CLASSES
    assert {int(held_out[index]["label"]) for index in range(len(held_out))} == {1, 2}
    assert labels(held_out) == labels(open_split(data(FolderSource(root=str(root))), "eval"))


def test_images_may_move_and_changed_ones_are_noticed(sets: Path, tmp_path: Path) -> None:
    def identity(source: SourceConfig) -> dict[str, object]:
        config, splits = data(source), {}
        names: tuple[Split, ...] = ("train", "eval")
        for split in names:
            splits[f"{split}_source"] = open_split(config, split)
        return input_identity(config, seed=0, **splits)

    for kind in KINDS:
        copied(kind, sets, tmp_path)
        assert identity(config_of(kind, tmp_path)) == identity(config_of(kind, sets)), kind
    (tmp_path / "folder" / "val").rename(tmp_path / "folder" / "test")
    renamed = FolderSource(root=str(tmp_path / "folder"), eval="test")
    assert identity(renamed) == identity(config_of("folder", sets))
    one = next((tmp_path / "folder" / "train" / CLASSES[0]).iterdir())
    one.write_bytes(image_file(99))  # under the same name
    assert identity(renamed) != identity(config_of("folder", sets))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_held_out_examples_may_not_be_the_same(sets: Path, kind: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "folder": {"eval": "train"},
        "array_record": {"eval": (f"{sets}/array_record/train-00001-*",)},
        "tfds": {"eval_split": "train[:2]"},
    }
    config = data(dataclasses.replace(config_of(kind, sets), **changes[kind]))
    with pytest.raises(ConfigError, match="an evaluation on training images means nothing"):
        open_split(config, "train")
    assert len(open_split(config, "eval", CLASSES)) > 0  # to evaluate a run on what it was trained on
    open_split(dataclasses.replace(config, num_held_out=3), "train")  # the eval split is not used


def test_shards_are_kept_apart_by_content_not_by_place(sets: Path, tmp_path: Path) -> None:
    copied("array_record", sets, tmp_path)
    there, copy = sets / "array_record", tmp_path / "array_record"
    config = ArrayRecordSource(train=(f"{there}/train-*",), eval=(f"{copy}/train-00002-*",))
    with pytest.raises(ConfigError, match="share 1 shards"):
        open_split(data(config), "train")
    greedy = ArrayRecordSource(train=(f"{there}/*.array_record",), eval=(f"{there}/eval-*",))
    with pytest.raises(ConfigError, match="takes 2 shards of the held-out set, such as"):
        open_split(data(greedy), "train")
    apart = ArrayRecordSource(train=(f"{there}/train-0000[01]-*",), eval=(f"{there}/train-00002-*",))
    assert [len(open_split(data(apart), split)) for split in ("train", "eval")] == [8, 4]
    for path in sorted((copy).glob("train-0000[01]*")):  # the training shards need not be where only evaluation runs
        path.unlink()
    moved = ArrayRecordSource(train=(f"{copy}/train-0000[01]-*",), eval=(f"{copy}/train-00002-*",))
    assert len(open_split(data(moved), "eval", CLASSES)) == 4


def test_a_pattern_that_finds_a_part_of_a_set_is_an_error_that_names_the_rest(sets: Path) -> None:
    there = sets / "array_record"
    whole = ArrayRecordSource(train=(f"{there}/train-*",), eval=(f"{there}/eval-*",))
    part = dataclasses.replace(whole, eval=(f"{there}/eval-00000*",))
    rest = (
        r"eval-00000\*',\): leaves out 1 of the 2 shards .*/eval\.json', with 3 of its 6 examples, such as eval-00001"
    )
    with pytest.raises(ConfigError, match=rest):
        open_split(data(part), "eval")
    for train in (("train-00000*", "train-00002*"), ("train-00000*", "train-00002-of-00003.array_record")):
        config = dataclasses.replace(whole, train=tuple(f"{there}/{name}" for name in train))
        with pytest.raises(
            ConfigError, match=r"source\.train = .* leaves out 1 of the 3 shards .* train-00001-of-00003"
        ):
            open_split(data(config), "train")
    several = dataclasses.replace(whole, train=tuple(f"{there}/train-0000{index}*" for index in range(3)))
    assert len(open_split(data(several), "train")) == 12
    named = open_split(data(dataclasses.replace(whole, eval=(f"{there}/eval-00001-of-00002.array_record",))), "eval")
    assert len(named) == 3
    assert [(found.num_files, "not used are 1 of the 2 shards" in found.text) for found in named.unused] == [(1, True)]
