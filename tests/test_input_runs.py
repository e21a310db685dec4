"""Runs on image folders through the command line: what is wrong with the images is said, and where."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfnet_flax import cli, exit_codes
from nfnet_flax.recipe import recipe_differences, save_recipe
from nfnet_flax.recipe_file import load_recipe
from tests import runs
from tests.test_cli import fails
from tests.test_resume import scalars


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty training and eight evaluation images of ten classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        for index in range(count):
            path = tmp_path / "images" / split / f"class_{index % 10}" / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(path)
    return tmp_path / "images"


def recipe_on(folder: Path) -> str:
    """The digits recipe on a folder of images that is still to be named."""
    text = runs.DIGITS.read_text()
    for old, new in (
        ("source=DigitsSource()", "source=FolderSource(root='nowhere'), augment=CropAugment()"),
        ("import DigitsSource", "import FolderSource\nfrom nfnet_flax.data.augment_config import CropAugment"),
        ("batch_size=64", "batch_size=8, eval_batch_size=8"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def options(root: Path, tmp_path: Path) -> list[str]:
    words = f"--workdir {tmp_path / 'run'} --data.source.root {root} --data.augment.min-area 0.5".split()
    return ["train", recipe_on(tmp_path), *words, *runs.SMALL[0].replace("=", " ").split(), "--model.depths", "1"]


def test_a_corrupt_image_ends_the_run_with_its_name(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere" in fails(capsys, "train", recipe_on(tmp_path), "--workdir", str(tmp_path / "run"))
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:500])
    message = fails(capsys, *options(root, tmp_path))
    assert f"nfnet: error: {root}/train/class_" in message
    assert "(example " in message
    assert "--data.on-corrupt skip" in message
    # In the same folder, where nothing was trained: what else was wrong may be put right, too.
    none = fails(capsys, *options(root, tmp_path), "--data.on-corrupt", "skip", "--num-classes", "11")
    assert "10 classes, 11 outputs: " in none
    assert "another run than at the last start, which trained nothing here: num_classes: 10 -> 11" in none
    assert "none of the 40 training images can be decoded" in none


def test_a_run_counts_the_corrupt_images_that_it_replaced(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "train" / "class_0" / "notes.txt").write_text("of the set")
    bad = sorted((root / "train").rglob("*.png"))[:4]
    for path in bad:
        path.write_bytes(b"not an image")
    words = [*options(root, tmp_path), "--num-steps", "5", "--log-every-steps", "2", "--data.on-corrupt", "skip"]
    assert cli.main(words) == exit_codes.EXIT_DONE
    warned = capsys.readouterr().err
    assert f"nfnet: {root}/train: not used are 1 files whose names end in none of" in warned
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Five batches of eight are one epoch; steps 1, 3 and 5 are no log steps.
    assert sum(row.get("data/num_corrupt", 0) for row in rows) == len(bad)
    shown = scalars(tmp_path / "run")["data/num_corrupt"]
    assert sum(value for _, value in shown) == len(bad)
    assert len({step for step, _ in shown}) == len(shown)
    # The first of them are said on the terminal, once, and the report has the sum.
    step = next(row["step"] for row in rows if row.get("data/num_corrupt", 0) > 0)
    first_step = step - 1 if step in (2, 4) else step
    seen = [row for row in rows if first_step <= row["step"] <= first_step + 1]
    number = round(sum(row.get("data/num_corrupt", 0) for row in seen if row["step"] <= 5))
    images = "1 damaged image was" if number == 1 else f"{number} damaged images were"
    steps = "step 5" if first_step == 5 else f"steps {first_step} to {first_step + 1}"
    assert warned.count("replaced by other images") == 1
    assert f"nfnet: {images} replaced by other images in {steps} (--data.on-corrupt skip)" in warned
    assert cli.main(["report", str(tmp_path / "run")]) == exit_codes.EXIT_DONE
    assert re.search(r"damaged images replaced +4, anew in each epoch", capsys.readouterr().out)


def test_another_input_under_the_same_recipe_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(recipe_on(tmp_path))
    path.write_text(path.read_text().replace("'nowhere'", repr(str(root))))
    recipe = load_recipe(path)
    workdir = tmp_path / "run"
    runs.claimed(workdir, recipe)
    runs.claimed(workdir, recipe)
    next((root / "train").rglob("*.png")).unlink()
    message = fails(capsys, "train", str(path), "--workdir", str(workdir))
    assert "was trained on another input" in message
    assert "source.num_examples: 40 -> 39" in message


def test_a_run_in_the_images_that_it_is_trained_on_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*options(root, tmp_path), "--workdir", str(root / "val" / "run")]
    assert "in which every folder is a class: give one outside" in fails(capsys, *words)
    assert not (root / "val" / "run").exists()


def test_more_classes_than_outputs_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, *options(root, tmp_path), "--num-classes", "9")
    assert "num_classes = 9: must be at least 10" in message


def test_how_many_threads_prepare_the_input_may_change_at_a_resume(tmp_path: Path) -> None:
    recipe = load_recipe(runs.DIGITS)
    save_recipe(recipe, tmp_path / "recipe.json")
    faster = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_workers=3, stall_timeout_s=9.0))
    assert recipe_differences(recipe, faster) == []
    smaller = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch_size=32))
    assert recipe_differences(recipe, smaller) == ["data.batch_size: 64 -> 32"]
