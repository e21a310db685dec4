"""What a run trained on is never counted as held out: not in training, and not by an evaluation afterwards."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.held_out import check_distinct, open_held_out
from nfnet_flax.data.pipeline import input_identity, open_split, source_record
from nfnet_flax.data.random_access import Source
from nfnet_flax.data.source_config import DigitsSource, FolderSource
from nfnet_flax.doctor.data import check_data
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.setup import assemble
from tests.image_sets import CLASSES, config_of, copied
from tests.runs import DIGITS
from tests.test_classes import KINDS, data

TRAINED_ON = "an evaluation on training images means nothing"


def held_out_of_run(trained: DataConfig, config: DataConfig) -> Source:
    """What an evaluation with `config` opens after a run with `trained`."""
    train, held_out = open_split(trained, "train"), open_split(trained, "eval")
    record = json.loads(json.dumps(input_identity(trained, seed=0, train_source=train, eval_source=held_out)))
    return open_held_out(config, train.class_names, trained=trained, record=record)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_counts_only_what_the_run_left_out(sets: Path, kind: str) -> None:
    own = data(config_of(kind, sets))
    assert len(held_out_of_run(own, own)) == 6
    part = dataclasses.replace(own, num_held_out=5)
    assert len(held_out_of_run(part, part)) == 5
    assert len(held_out_of_run(part, own)) == 6  # the set's own held-out split was not trained on
    with pytest.raises(ConfigError, match=r"num_held_out = 5: must be None, as in the run.*--data\.source\.eval"):
        held_out_of_run(own, part)
    with pytest.raises(ConfigError, match=r"num_held_out = 7: must be 5, as in the run.*--data\.source\.eval"):
        held_out_of_run(part, dataclasses.replace(own, num_held_out=7))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_split_is_no_held_out_split_whatever_the_recipe_of_the_evaluation_says(
    sets: Path, kind: str
) -> None:
    own = data(config_of(kind, sets))
    changes: dict[str, list[dict[str, Any]]] = {
        "folder": [{"eval": "train"}, {"eval": "train", "train": "val"}],
        "array_record": [
            {"eval": (f"{sets}/array_record/train-*",)},
            {"eval": (f"{sets}/array_record/train-00001-*",), "train": (f"{sets}/array_record/train-00000-*",)},
        ],
        "tfds": [{"eval_split": "train"}, {"eval_split": "train[:2]", "train_split": "train[2:]"}],
    }
    for trained in (own, dataclasses.replace(own, num_held_out=5)):
        for change in changes[kind]:
            with pytest.raises(ConfigError, match=TRAINED_ON):
                held_out_of_run(trained, data(dataclasses.replace(own.source, **change)))


def test_a_copy_of_the_training_split_is_no_held_out_split(sets: Path, tmp_path: Path) -> None:
    root = copied("folder", sets, tmp_path)
    trained, copy = data(FolderSource(root=str(root))), data(FolderSource(root=str(tmp_path / "copy")))
    shutil.copytree(root / "train", tmp_path / "copy" / "val")
    for before in (trained, dataclasses.replace(trained, num_held_out=5)):
        with pytest.raises(ConfigError, match=TRAINED_ON):
            held_out_of_run(before, copy)
    shutil.copytree(root / "train", tmp_path / "copy" / "train")
    recipe = dataclasses.replace(load_recipe(DIGITS), data=dataclasses.replace(copy, batch_size=8, eval_batch_size=8))
    with pytest.raises(ConfigError, match=TRAINED_ON):
        assemble(recipe, None)
    assert [TRAINED_ON in finding.text for finding in check_data(recipe, None) if finding.is_wrong] == [True]
    # Names may be the same in both splits, such as 0.png: then sizes tell them apart.
    one = next((tmp_path / "copy" / "val" / CLASSES[0]).iterdir())
    one.write_bytes(one.read_bytes() + b"\0")
    check_distinct(source_record(open_split(copy, "train")), None, open_split(copy, "eval"))


def test_another_training_folder_shifts_no_trained_example_into_the_held_out_ones(sets: Path, tmp_path: Path) -> None:
    root = copied("folder", sets, tmp_path)
    trained = data(FolderSource(root=str(sets / "folder")), 5)
    moved = dataclasses.replace(trained, source=FolderSource(root=str(root)))
    assert len(held_out_of_run(trained, moved)) == 5
    image = next((root / "train" / CLASSES[0]).iterdir())
    renamed = image.rename(image.with_name("another_name.JPEG"))
    with pytest.raises(ConfigError, match="not those that the run held out"):
        held_out_of_run(trained, moved)
    renamed.unlink()
    with pytest.raises(ConfigError, match="not those that the run held out"):
        held_out_of_run(trained, moved)


def test_digits_may_be_evaluated_at_another_size() -> None:
    trained = data(DigitsSource(), 20)
    larger = held_out_of_run(trained, dataclasses.replace(trained, eval_image_size=16))
    assert larger[0]["image"].shape == (16, 16, 3)
