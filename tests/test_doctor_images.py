"""`nfnet doctor --all-images`: each image that is damaged is named, wherever it lies, and no other one."""

import dataclasses
import os
from pathlib import Path

import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.data.image_folder import ImageFolder
from nfnet_flax.data.random_access import Split
from nfnet_flax.data.source_config import FolderSource, ParquetSource, SourceConfig, WebDatasetSource
from nfnet_flax.doctor.findings import Finding
from nfnet_flax.doctor.images import check_images
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe
from tests import runs
from tests.image_sets import CLASSES, config_of, copied, make_folder
from tests.packed_sets import make_parquet, make_webdataset
from tests.test_doctor import problems
from tests.test_input_runs import recipe_on


def on(source: SourceConfig) -> Recipe:
    """The digits recipe on other images."""
    recipe = load_recipe(runs.DIGITS)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=source, num_held_out=None))


def checked(source: SourceConfig) -> list[Finding]:
    return list(check_images(on(source), None, timeout_s=60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 60 training images, two of them damaged, and 6 held-out ones, one of them an empty file."""
    root = make_folder(tmp_path / "folder", num_train=20)
    for number in (3, 17):
        path = root / "train" / CLASSES[1] / f"{CLASSES[1]}_{number}.JPEG"
        os.truncate(path, path.stat().st_size * 2 // 3)
    os.truncate(next((root / "val" / CLASSES[0]).iterdir()), 0)
    return root


@pytest.mark.parametrize("form", ["folder", "parquet", "webdataset"])
def test_each_damaged_image_is_named_in_each_storage(form: str, folder: Path, tmp_path: Path) -> None:
    source: SourceConfig = FolderSource(root=str(folder))
    if form == "parquet":
        make_parquet(folder, tmp_path / form)
        source = ParquetSource(root=str(tmp_path / form))
    elif form == "webdataset":
        make_webdataset(folder, tmp_path / form)
        source = WebDatasetSource(root=str(tmp_path / form))
    *images, train, empty, held_out = checked(source)
    assert [finding.is_wrong for finding in (*images, train, empty, held_out)] == [True, True, False, True, False]
    for number in (3, 17):
        assert sum(f"{CLASSES[1]}_{number}.JPEG" in finding.text for finding in images) == 1
    assert all(finding.text.startswith("train: ") and ": damaged " in finding.text for finding in images)
    assert train.text.startswith("train: 2 of 60 cannot be decoded or read: repair them under the same names")
    assert "the file is empty (0 bytes)" in empty.text
    assert held_out.text.startswith("eval: 1 of 6 cannot be decoded or read")


def test_they_are_named_at_once_and_it_is_said_that_nothing_is_left(folder: Path) -> None:
    for path in (folder / "train").glob("*/*"):
        os.truncate(path, 10)
    found = check_images(on(FolderSource(root=str(folder))), None, timeout_s=60)
    assert next(found).text.startswith(f"train: '{folder}/train/")
    *_, train, _, _ = found
    assert train.text.startswith("train: none of 60 can be decoded or read")


@pytest.mark.parametrize("form", ["folder", "array_record", "tfds", "parquet", "webdataset"])
def test_sound_images_are_sound(form: str, sets: Path) -> None:
    train, held_out = checked(config_of(form, sets))
    assert (train.text, held_out.text) == ("train: all 12 can be decoded", "eval: all 6 can be decoded")
    assert not train.is_wrong
    assert not held_out.is_wrong


def test_images_that_are_in_memory_have_nothing_to_decode() -> None:
    recipe = load_recipe(runs.DIGITS)
    found = list(check_images(recipe, None, timeout_s=60))
    assert [finding.text for finding in found] == [
        "train: all 1437 can be decoded",
        "eval: all 360 can be decoded",
    ]


def test_a_flipped_byte_of_a_record_is_named(sets: Path, tmp_path: Path) -> None:
    root = copied("array_record", sets, tmp_path / "damaged")
    shard = sorted(root.rglob("train*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found = problems(checked(config_of("array_record", root.parent)))
    assert shard.name in found[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderOnADiskThatHangs(FolderSource):
    """A folder whose last image cannot be read to its end any more once it was listed."""

    def open(self, split: Split, image_size: int) -> ImageFolder:
        found = super().open(split, image_size)
        path = Path(found.describe(len(found) - 1))
        path.unlink()
        os.mkfifo(path)  # whoever opens it waits for a writer
        return found


def test_a_disk_that_hangs_is_left_behind(folder: Path) -> None:
    found = problems(list(check_images(on(FolderOnADiskThatHangs(root=str(folder))), None, timeout_s=0.5)))
    for pipe in (path for path in folder.glob("*/*/*") if path.is_fifo()):
        os.close(os.open(pipe, os.O_WRONLY))  # lets the thread end
    hanging = [line for line in found if "no image was decoded within 0.5 s, after " in line]
    assert [line.partition(":")[0] for line in hanging] == ["train", "eval"]


def test_the_command_names_them_and_keeps_them_out_of_a_public_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / CLASSES[1]).rename(folder / "train" / "Tante Sophie")
    (folder / "val" / CLASSES[1]).rename(folder / "val" / "Tante Sophie")
    recipe = Path(recipe_on(tmp_path))
    recipe.write_text(recipe.read_text().replace("'nowhere'", repr(str(folder))))
    words = ["doctor", "--recipe", str(recipe)]
    assert cli.main([*words, "--all-images"]) == exit_codes.EXIT_WRONG
    printed = capsys.readouterr().out
    assert f"images    WRONG: train: '{folder}/train/Tante Sophie/{CLASSES[1]}_" in printed
    assert cli.main([*words, "--all-images", "--report"]) == exit_codes.EXIT_WRONG
    printed = capsys.readouterr().out
    assert "train: 2 of 60 cannot be decoded or read" in printed
    assert "ophie" not in printed
    assert cli.main(["doctor", "--all-images"]) == exit_codes.EXIT_WRONG
    assert "WRONG: no recipe is known, so no image: give --recipe FILE" in capsys.readouterr().out
