"""What TensorBoard shows of a run: read back from the event files that real runs have written."""

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from nfnet_flax import Run, load_recipe
from nfnet_flax.data.pipeline import eval_batches, open_split, train_batches
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.recipe import Recipe
from nfnet_flax.telemetry.board import HeldOut, caption_of, write_first_batch, write_outcomes
from nfnet_flax.telemetry.config import TelemetryConfig
from nfnet_flax.telemetry.outcomes import NO_CLASS, Outcomes
from nfnet_flax.telemetry.overview import RUNS
from nfnet_flax.telemetry.pictures import confusion_matrix, grid
from nfnet_flax.training.gradient import normalise
from nfnet_flax.training.metrics import MetricsLog
from nfnet_flax.training.setup import assemble
from nfnet_flax.training.showing import observer, open_log
from tests import runs

Key = tuple[str, int, str]
"""Run (folder of event files), step and tag."""
STEPS, EVERY, GROUP = 40, 20, 8
OPTIONS = (
    f"--num-steps={STEPS}",
    f"--eval-every-steps={EVERY}",
    f"--checkpoint.every-steps={EVERY}",
    f"--data.mixing.group-size={GROUP}",
    "--tensorboard",
)
HPARAMS = "_hparams_/session_start_info"
LAYOUT = "custom_scalars__config__"
TILE, GAP = 96, 6
"""Side of a magnified image in a grid, and the space between them, in pixels."""


def values(workdir: Path) -> dict[Key, list[Any]]:
    """All values in the event files of a run, in files of any name, in their order. Each should be there once."""
    found: dict[Key, list[Any]] = {}
    for path in sorted((workdir / "tensorboard").rglob("*tfevents*")):
        run = path.parent.relative_to(workdir / "tensorboard").as_posix().removeprefix(".")
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                found.setdefault((run, event.step, value.tag), []).append(value)
    return found


def only(workdir: Path, run: str, step: int, tag: str) -> np.ndarray:
    """The one value of a step and tag."""
    (value,) = values(workdir)[run, step, tag]
    return tf.make_ndarray(value.tensor)


def picture(workdir: Path, step: int, tag: str) -> np.ndarray:
    """An image as TensorBoard gets it, (H, W, 3) uint8."""
    width, height, png = only(workdir, "", step, tag).tolist()
    pixels = tf.io.decode_png(png).numpy()
    assert pixels.shape == (int(height), int(width), 3)
    return pixels


def tiles(pixels: np.ndarray, num_lines: int, factor: int) -> Iterator[np.ndarray]:
    """The images of a grid as they were before they were magnified; the places without one are white."""
    for top in range(GAP, pixels.shape[0], TILE + 15 * num_lines + GAP):
        for left in range(GAP, pixels.shape[1], TILE + GAP):
            tile = pixels[top : top + TILE, left : left + TILE]
            small = tile[::factor, ::factor]
            if np.all(small == 255):
                continue
            assert np.array_equal(tile, small.repeat(factor, axis=0).repeat(factor, axis=1))
            yield small


def write_steps(workdir: Path, steps: range, *, evaluated: bool = True) -> None:
    log = MetricsLog(workdir, resume_step=steps.start - 1, evaluated=evaluated, tensorboard=True)
    for step in steps:
        log.write(step, {"train/loss": 1.0, "eval/loss": 2.0, "eval/num_examples": 9.0})
        numbers = np.array([step, 2 * step, np.nan, np.inf])
        log.write_histograms(step, {"agc/a": numbers, "agc/b": 3 * numbers, "agc/c": np.full(2, np.nan)})
        log.write_images(step, {"eval/wrong": np.full((2, 3, 3), step, np.uint8)})
        log.write_texts(step, {"note": f"step {step}"})
    log.close()


@pytest.mark.parametrize("evaluated", [False, True])
def test_all_kinds_of_values_stand_once_after_a_resume(evaluated: bool, tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(4, 7), evaluated=evaluated)
    found = values(tmp_path)
    assert {key for key, stored in found.items() if len(stored) > 1} == set()
    tags = {"": ("train/loss", "agc/a", "agc/b", "note"), "train": ("Overview/1 loss",)}
    of_evaluation = {"": ("eval/loss", "eval/wrong"), "held_out": ("Overview/1 loss",)}
    evaluations = (1, 2, 3, 4, 5, 6) if evaluated else (1, 2, 4, 5, 6)
    wanted = {(run, step, tag) for step in range(1, 7) for run in tags for tag in tags[run]}
    assert found.keys() == wanted | {
        (run, step, tag) for step in evaluations for run in of_evaluation for tag in of_evaluation[run]
    }
    for step in range(1, 7):
        left, right, counts = only(tmp_path, "", step, "agc/b").T
        assert (left[0], right[-1], counts.sum()) == (3 * step, 6 * step, 2)
        assert only(tmp_path, "", step, "note").item() == f"step {step}".encode()
    for step in evaluations:
        assert np.array_equal(picture(tmp_path, step, "eval/wrong"), np.full((2, 3, 3), step, np.uint8))


def test_files_of_one_process_are_named_in_the_order_in_which_they_are_made(tmp_path: Path) -> None:
    made: list[str] = []
    for first in (1, 2, 3):
        write_steps(tmp_path, range(first, first + 1))
        (new,) = {path.name for path in (tmp_path / "tensorboard").glob("events.*")} - set(made)
        made.append(new)
    seconds = [int(name.split(".")[3]) for name in made]
    assert seconds == sorted(set(seconds))


def test_the_overview_of_an_older_run_is_made_from_its_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(tmp_path, range(1, 5))
    for run in filter(None, RUNS):
        shutil.rmtree(tmp_path / "tensorboard" / run)
    capsys.readouterr()
    write_steps(tmp_path, range(4, 6))
    assert "nfnet: 6 values that TensorBoard's files do not hold are written again" in capsys.readouterr().err
    found = values(tmp_path)
    for run, value in (("train", 1.0), ("held_out", 2.0)):
        assert {step for its_run, step, _ in found if its_run == run} == {1, 2, 3, 4, 5}
        assert {only(tmp_path, run, step, "Overview/1 loss").item() for step in range(1, 6)} == {value}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its first evaluation, and went on in two processes."""
    workdir = tmp_path_factory.mktemp("shown") / "run"
    process = runs.start(workdir, *OPTIONS)
    runs.signal_at(process, EVERY + 5, signal.SIGKILL, workdir / "checkpoints" / str(EVERY))
    assert process.returncode == -signal.SIGKILL
    first = values(workdir)
    assert ("", EVERY, "eval_ema/confusion") in first
    processes = runs.start_all(workdir, 2, *OPTIONS)
    printed = [runs.finish(process) for process in processes]
    assert [process.returncode for process in processes] == [EXIT_DONE, EXIT_DONE], printed
    assert f"continuing from step {EVERY} " in printed[0]
    return workdir


def test_after_a_kill_everything_is_there_once(shown: Path) -> None:
    found = values(shown)
    assert {key for key, stored in found.items() if len(stored) > 1} == set()
    steps, evaluations = range(1, STEPS + 1), range(EVERY, STEPS + 1, EVERY)
    once = {("", 0, tag) for tag in ("train/first_batch", "run/recipe", "run/parameters", LAYOUT)}
    once |= {(run, 0, HPARAMS) for run in ("held_out", "held_out_ema")}
    of_evaluation = ("confusion", "most_confidently_wrong", "classes", "accuracy_of_classes", "top1", "loss")
    once |= {("", step, f"eval_ema/{name}") for step in evaluations for name in of_evaluation}
    cards = {
        "train": (steps, ("1 loss", "2 top-1 accuracy", "3 learning rate", "4 images per s")),
        "held_out": (evaluations, ("1 loss", "2 top-1 accuracy")),
        "held_out_ema": (evaluations, ("1 loss", "2 top-1 accuracy")),
    }
    overview = {
        (run, step, f"Overview/{card}")
        for run, (its_steps, names) in cards.items()
        for step in its_steps
        for card in names
    }
    assert {key for key in found if key[0]} == overview | {key for key in once if key[0]}
    assert once <= found.keys()
    assert {step for run, step, tag in found if tag == "train/loss"} == set(steps)
    # TensorBoard shows cards in the order of their tags. What never changes is not there.
    tags = {tag for _, step, tag in found if step > 0}
    assert min(tags) == "Overview/1 loss"
    assert "eval/num_examples" not in tags
    rows = {row["step"]: row for row in map(json.loads, (shown / "metrics.jsonl").read_text().splitlines())}
    for run, step, tag, name in (
        ("train", 25, "1 loss", "train/loss"),
        ("held_out_ema", 40, "2 top-1 accuracy", "eval_ema/top1"),
    ):
        assert only(shown, run, step, f"Overview/{tag}").item() == pytest.approx(rows[step][name], rel=1e-6)


def test_the_first_batch_is_what_the_network_gets(shown: Path) -> None:
    recipe = Run(shown).recipe
    source = open_split(recipe.data, "train")
    options: dict[str, Any] = {"seed": recipe.seed, "start_step": 0, "num_steps": 1}
    with train_batches(recipe.data, source, process_index=0, num_processes=1, **options) as batches:
        rows = next(batches)
    assert "mix_label" in rows
    found = list(tiles(picture(shown, 0, "train/first_batch"), num_lines=2, factor=TILE // recipe.data.image_size))
    assert len(found) == len(rows["image"]) == 16
    for image, tile in zip(rows["image"], found, strict=True):
        assert np.array_equal(image, tile)


def predicted(recipe: Recipe, workdir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and probabilities of the held-out set, by the EMA of the last checkpoint, in one process."""
    model = Run(workdir).model("ema", checkpoint=STEPS)
    data = recipe.data
    with eval_batches(data, open_split(data, "eval"), process_index=0, num_processes=1) as batches:
        rows = list(batches)
    images, labels, mask = (np.concatenate([each[name] for each in rows]) for name in ("image", "label", "mask"))
    images, labels = images[mask > 0], labels[mask > 0]
    logits = jax.jit(model)(normalise(jax.numpy.asarray(images), data.mean, data.std))
    return images, labels, np.asarray(jax.nn.softmax(logits))


def test_evaluations_show_the_classes_and_the_worst_mistakes_of_all_processes(shown: Path) -> None:
    recipe = Run(shown).recipe
    images, labels, probabilities = predicted(recipe, shown)
    best, highest = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = best == labels
    assert 0 < right.mean() < 1
    assert json.loads((shown / "metrics.jsonl").read_text().splitlines()[-1])["eval_ema/top1"] == right.mean()

    counts = np.zeros((10, 10), np.int64)
    np.add.at(counts, (labels, best), 1)
    names = [str(label) for label in range(10)]
    assert np.array_equal(picture(shown, STEPS, "eval_ema/confusion"), confusion_matrix(counts, names))
    text = only(shown, "", STEPS, "eval_ema/classes").item().decode()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    shares = {str(label): right[labels == label].mean() for label in range(10)}
    assert {row[0]: row[1] for row in table} == {name: f"{share:.1%}" for name, share in shares.items()}
    assert [shares[row[0]] for row in table] == sorted(shares.values())
    histogram = only(shown, "", STEPS, "eval_ema/accuracy_of_classes")
    assert histogram[:, 2].sum() == 10
    assert (histogram[0, 0], histogram[-1, 1]) == pytest.approx((min(shares.values()), max(shares.values())))

    factor = TILE // recipe.data.eval_image_size
    found = list(tiles(picture(shown, STEPS, "eval_ema/most_confidently_wrong"), num_lines=2, factor=factor))
    indexes = [int(np.flatnonzero((images == tile).all(axis=(1, 2, 3)))[0]) for tile in found]
    wrong = np.flatnonzero(~right)
    assert len(set(indexes)) == min(16, len(wrong))
    assert not right[indexes].any()
    assert highest[indexes] == pytest.approx(np.sort(highest[wrong])[::-1][: len(indexes)], abs=1e-5)
    half = recipe.data.eval_batch_size // 2  # rows of the first process
    assert {index % recipe.data.eval_batch_size < half for index in indexes} == {True, False}


def test_settings_and_layout_are_those_of_the_run(shown: Path) -> None:
    found = values(shown)
    for run, parameters in (("held_out", "raw"), ("held_out_ema", "EMA")):
        (value,) = found[run, 0, HPARAMS]
        hparams = parse_session_start_info_plugin_data(value.metadata.plugin_data.content).hparams
        assert hparams["parameters"].string_value == parameters
        assert hparams["model"].string_value == "NFNetConfig"
        assert hparams["model.widths"].string_value == "32"
        assert hparams["optim.learning_rate_per_256"].number_value == 0.4
        assert hparams["optim.method.nesterov"].bool_value is True
        assert hparams["optim.clipping"].string_value == "AGC"
        assert hparams["optim.clipping.groups.0.pattern"].string_value == "head.kernel"
        assert hparams["num_steps"].number_value == STEPS
        assert hparams["init_from"].string_value == "none"
        assert hparams["data.num_held_out"].number_value == runs.NUM_HELD_OUT
        assert not [name for name in hparams if re.match("checkpoint|telemetry|log_every|data$|optim$", name)]
    recipe = only(shown, "", 0, "run/recipe").item().decode().strip("`")
    assert json.loads(recipe) == json.loads((shown / "recipe.json").read_text())
    parameters = only(shown, "", 0, "run/parameters").item().decode()
    shapes = {name: array.shape for name, array in Run(shown).weights("raw").items()}
    for name, shape in shapes.items():
        assert re.search(rf"^\| {re.escape(name)} +\| {re.escape(str(shape))} +\| float32 ", parameters, re.MULTILINE)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert parameters.endswith(f"{len(shapes)} arrays, {total:,} parameters")
    layout = layout_pb2.Layout.FromString(only(shown, "", 0, LAYOUT).item())
    tags = {tag for run, _, tag in found if not run}
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert list(charts)[:2] == ["loss", "top-1"]
    for title, patterns in charts.items():
        assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), title
    assert [tag for tag in sorted(tags) if any(re.match(pattern, tag) for pattern in charts["loss"])] == [
        "eval/loss",
        "eval_ema/loss",
        "train/loss",
    ]


def image_recipe(root: Path, **telemetry: Any) -> Recipe:
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(4):
                level = 100 * label + 20 * number + (5 if split == "val" else 0)
                Image.new("RGB", (24, 24), (level, level, level)).save(root / split / name / f"{number}.png")
    recipe = load_recipe(str(runs.DIGITS))
    data = dataclasses.replace(
        recipe.data,
        source=FolderSource(root=str(root)),
        image_size=16,
        eval_image_size=16,
        batch_size=8,
        eval_batch_size=8,
    )
    return dataclasses.replace(recipe, num_classes=2, data=data, telemetry=TelemetryConfig(**telemetry))


def test_without_images_and_with_images_that_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = Outcomes(
        index=np.arange(8),
        label=np.repeat(np.arange(2, dtype=np.int32), 4),
        predicted=np.array([0, 0, 1, 0, 1, 1, NO_CLASS, 0], np.int32),
        probability=np.linspace(0.5, 0.9, 8).astype(np.float32),
    )
    recipe = image_recipe(tmp_path / "images")
    for name, images in (("with", True), ("without", False), ("gone", True)):
        setup = assemble(dataclasses.replace(recipe, telemetry=TelemetryConfig(images=images)), None)
        if name == "gone":
            shutil.rmtree(tmp_path / "images" / "val" / "dog")
        (tmp_path / name).mkdir()
        log = open_log(tmp_path / name, setup, 0, evaluated=False, on_metrics=None)
        observe = observer(setup, log, 5)
        assert observe is not None
        observe({"eval": outcomes, "eval_ema": outcomes})
        log.close()
    found = {
        name: {tag for _, step, tag in values(tmp_path / name) if step == 5} for name in ("with", "without", "gone")
    }
    numbers = {"eval_ema/classes", "eval_ema/accuracy_of_classes"}
    pictures = {"eval_ema/confusion", "eval_ema/most_confidently_wrong"}
    assert found == {"with": numbers | pictures, "without": numbers, "gone": numbers | {"eval_ema/confusion"}}
    said = capsys.readouterr().err
    assert said.count("nfnet: the held-out images that are predicted wrong cannot be shown: ") == 1
    # What was not finite is wrong, and not shown as a mistake.
    assert "| dog | 50.0% | 4 |" in only(tmp_path / "with", "", 5, "eval_ema/classes").item().decode()
    shown_images = tiles(picture(tmp_path / "with", 5, "eval_ema/most_confidently_wrong"), num_lines=2, factor=6)
    named = [re.search(r"(cat|dog)/(\d)\.png", setup.eval_source.describe(index)) for index in (7, 2)]
    levels = [100 * (match[1] == "dog") + 20 * int(match[2]) + 5 for match in named if match]
    assert [np.unique(image).tolist() for image in shown_images] == [[level] for level in levels]


def test_many_classes_have_a_short_table_and_no_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.arange(1010, dtype=np.int32) % 101
    best = np.where(rng.random(1010) < 0.5, label, 7).astype(np.int32)
    outcomes = Outcomes(np.arange(1010), label, best, np.full(1010, 0.5, np.float32))
    held_out = HeldOut(
        # Names of folders and files may hold bytes that are no text.
        class_names=[f"a|b {number}\n\udcff" for number in range(101)],
        read=lambda _: None,
        prefix="eval",
        has_images=True,
    )
    log = MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=True)
    rows: dict[str, np.ndarray] = {"image": np.zeros((4, 224, 224, 3), np.uint8), "label": np.arange(4)}
    write_first_batch(log, rows, held_out.class_names)
    write_outcomes(log, 1, {"eval": outcomes}, held_out)
    write_outcomes(log, 2, {}, held_out)  # an image may have several classes
    log.close()
    of_evaluation = {("", 1, "eval/classes"), ("", 1, "eval/accuracy_of_classes")}
    assert values(tmp_path).keys() == of_evaluation | {("", 0, "train/first_batch")}
    lines = only(tmp_path, "", 1, "eval/classes").item().decode().splitlines()
    assert [line.startswith("| a\\|b ") for line in lines[2:]] == [True] * 20 + [False] * 2
    assert re.fullmatch(r"\| a\\\|b [0-9]+\?\? \| [0-9.]+% \| 10 \|", lines[2])
    assert lines[-1] == "The other 81 classes are predicted better, or as well."


def test_captions_name_classes_and_shares() -> None:
    names = ["cat", "dog", "eel"]
    plain = {"label": np.array([2, 0])}
    assert caption_of(plain, 0, names) == ["eel"]
    mixed = plain | {"mix_label": np.array([2, 1]), "label_weight": np.array([0.3, 0.25], np.float32)}
    assert caption_of(mixed, 0, names) == ["eel"]
    assert caption_of(mixed, 1, names) == ["75% dog", "25% cat"]
    several = {"label": np.array([[1, 0, 1], [0, 0, 0]], np.uint8)}
    assert [caption_of(several, row, names) for row in (0, 1)] == [["cat", "eel"], ["(no class)"]]
    both = several | {"mix_label": np.array([[1, 1, 0]] * 2, np.uint8), "label_weight": np.array([0.5, 0.5])}
    assert caption_of(both, 0, names) == ["cat", "50% dog", "50% eel"]
    ten = {"label": np.ones((1, 10), np.uint8)}
    assert caption_of(ten, 0, [str(label) for label in range(10)]) == ["0", "1", "and 8 more"]


def test_a_matrix_has_a_cell_for_each_pair_and_a_bar_for_each_class() -> None:
    counts = np.array([[8, 2, 0], [0, 0, 0], [0, 0, 5]])
    side, left = 30, confusion_matrix(counts, ["a", "b", "c"])
    white = np.all(left == 255, axis=2)
    dark = np.all(left == (8, 48, 107), axis=2)
    # The diagonal of the third class: its cell, but for its lines and its number, is all dark.
    rows, columns = np.nonzero(dark)
    assert rows.max() - rows.min() < side
    assert columns.max() - columns.min() < side
    bars = np.all(left == (66, 146, 198), axis=2)
    widths = bars.sum(axis=1)[bars.any(axis=1)]
    assert sorted(set(widths.tolist())) == [81, 101]
    assert white.mean() > 0.3
    other = confusion_matrix(np.concatenate([counts, np.eye(3, 1, dtype=np.int64)], axis=1), ["a", "b", "c"])
    assert other.shape[1] > left.shape[1] + side - 1
    images = np.random.default_rng(0).integers(0, 256, (3, 200, 200, 3)).astype(np.uint8)
    placed = grid(images, [["one line"], ["a caption that is much too long for an image"], []])
    for number, (top, at) in enumerate(((6, 6), (6, 212), (6, 418))):
        assert np.array_equal(placed[top : top + 200, at : at + 200], images[number])
