"""`nfnet eval` on weights and runs: its measures against independent formulas, label sets, files, and bad input."""

import csv
import functools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from scipy.special import softmax  # type: ignore[import-untyped]

import nfnet_flax
from nfnet_flax import cli
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.label_sets import LabelSet
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.data.transforms import preprocess
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from nfnet_flax.models import Classifier, NFNetConfig, build_model
from nfnet_flax.models.params import update
from nfnet_flax.training.evaluating import evaluate, evaluate_weights
from nfnet_flax.training.predictions import calibration_error, predict
from nfnet_flax.training.reading import Run
from nfnet_flax.weights import Preprocessing, save_weights
from nfnet_flax.weights.files import write_safetensors
from tests.golden import FOLDER as GOLDENS
from tests.image_sets import image_file
from tests.runs import damage, finish, start
from tools.make_timm_golden import fill

NAMES = tuple(f"n{number:02d}" for number in range(12))
PREPARED = Preprocessing(
    image_size=24,
    crop_margin=5,
    resampler="pillow_bicubic",
    mean=(100.0, 110.0, 120.0),
    std=(50.0, 55.0, 60.0),
    keeps_aspect=True,
)


@functools.cache
def network() -> Classifier:
    """A small network for 12 classes whose random head spreads the logits of the images of `write_images`."""
    config = NFNetConfig(widths=(8, 8), depths=(1, 1), group_width=4, expansion=0.5)
    model = build_model(config, num_classes=len(NAMES), rngs=nnx.Rngs(0))
    model.eval()
    prepared = preprocess([image_file(number) for number in range(1, 40)], **vars(PREPARED))
    features = np.asarray(nnx.jit(lambda model, images: model.features(images))(model, jnp.asarray(prepared)))
    kernel = np.random.default_rng(3).standard_normal((features.shape[1], len(NAMES))) / features.std(axis=0)[:, None]
    logits = features @ kernel
    scale = 2.0 / logits.std(axis=0)
    update(model, {"head.kernel": jnp.asarray(kernel * scale, jnp.float32)})
    update(model, {"head.bias": jnp.asarray(-logits.mean(axis=0) * scale, jnp.float32)})
    return model


def write_weights(path: Path, names: tuple[str, ...] | None = NAMES, prepared: Preprocessing | None = PREPARED) -> Path:
    """The file of the small network."""
    save_weights(path, network(), source="a test", parameters="ema", class_names=names, preprocessing=prepared)
    return path


def write_images(folder: Path, classes: Sequence[str], per_class: int = 3) -> Path:
    """Class folders with files that are named as in ImageNet's validation set; there is no training split."""
    number = 0
    for name in classes:
        (folder / name).mkdir(parents=True)
        for _ in range(per_class):
            number += 1
            (folder / name / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(image_file(number))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "val", NAMES[:7])


def command(weights: Path, images: Path, *options: object) -> list[str]:
    """The command line for images whose class folders lie in `images` itself."""
    root = ["--data.source.root", str(images), "--data.source.eval", ".", "--data.eval-batch-size", "8"]
    return ["eval", "--weights", str(weights), *root, *map(str, options)]


def fails(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    """Runs a command that must end with exit code 2, a message, and no traceback."""
    try:
        code: int | str | None = cli.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    printed = "".join(capsys.readouterr())
    assert code == EXIT_BAD_INPUT, printed
    assert "Traceback" not in printed
    return " ".join(printed.replace("│", " ").split())


def measured(weights: Path, images: Path, *options: object) -> dict[str, float]:
    """The metrics that the command writes as JSON."""
    file = images.parent / "measured.json"
    assert cli.main(command(weights, images, "--json", file, "--overwrite", *options)) == EXIT_DONE
    (row,) = json.loads(file.read_text())
    found: dict[str, float] = row["metrics"]
    return found


def by_hand(weights: Path, paths: Sequence[Path], *, mirrored: bool = False) -> np.ndarray:
    """Logits of the network that `load_model` makes, in float64."""
    prepared = preprocess([path.read_bytes() for path in paths], **vars(PREPARED))
    batch = jnp.asarray(prepared[:, :, ::-1] if mirrored else prepared)
    return np.asarray(nnx.jit(nfnet_flax.load_model(weights))(batch), np.float64)


def files_in(images: Path) -> tuple[list[Path], np.ndarray]:
    """The image files, and the number of the class that each folder names."""
    paths = sorted(images.glob("*/*"))
    return paths, np.array([NAMES.index(path.parent.name) for path in paths])


def ece_by_hand(confidence: np.ndarray, is_right: np.ndarray) -> float:
    total = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(is_right[inside].mean() - confidence[inside].mean())
    return total


def test_measures_and_files_are_those_of_independent_formulas(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.metrics import confusion_matrix, top_k_accuracy_score

    out = {name: tmp_path / "new" / f"{name}.out" for name in ("json", "per-class-csv", "confusion-csv")}
    out |= {name: tmp_path / f"{name}.out" for name in ("confusion-png", "predictions-csv")}
    options = [word for name, file in out.items() for word in (f"--{name}", str(file))]
    assert cli.main(command(weights, images, *options)) == EXIT_DONE
    printed = capsys.readouterr()
    paths, labels = files_in(images)
    logits = by_hand(weights, paths)
    probabilities = softmax(logits, axis=1)
    best = logits.argmax(axis=1)
    assert len(set(best.tolist())) > 2
    wanted = {
        "top1": float(np.mean(best == labels)),
        "top5": top_k_accuracy_score(labels, logits, k=5, labels=range(len(NAMES))),
        "loss": float(-np.mean(np.log(probabilities[np.arange(len(labels)), labels]))),
        "ece": ece_by_hand(probabilities.max(axis=1), best == labels),
        "num_examples": 21.0,
    }
    (row,) = json.loads(out["json"].read_text())
    assert (row["weights"], row["parameters"]) == ("a test", "ema")
    assert row["metrics"] == pytest.approx(wanted, rel=1e-4)
    assert printed.out.splitlines()[0] == "weights: a test"
    assert f"{wanted['top1']:.2%}" in printed.out.splitlines()[2]
    assert "on 21 examples" in printed.out
    assert printed.err == ""

    table = list(csv.reader(out["confusion-csv"].read_text().splitlines()))
    assert table[0] == ["class", *NAMES]
    assert [line[0] for line in table[1:]] == list(NAMES)
    counts = np.array([line[1:] for line in table[1:]], int)
    assert np.array_equal(counts, confusion_matrix(labels, best, labels=range(len(NAMES))))
    per_class = list(csv.DictReader(out["per-class-csv"].read_text().splitlines()))
    assert [line["class"] for line in per_class] == list(NAMES[:7])
    for number, line in enumerate(per_class):
        assert float(line["top1"]) == pytest.approx(np.mean(best[labels == number] == number), abs=1e-6)
        assert line["num_examples"] == "3"
    rows = {line["file"]: line for line in csv.DictReader(out["predictions-csv"].read_text().splitlines())}
    assert set(rows) == set(map(str, paths))
    for number, path in enumerate(paths):
        line, order = rows[str(path)], np.argsort(-logits[number])[:5]
        assert line["label"] == path.parent.name
        assert [line[f"top{rank}"] for rank in range(1, 6)] == [NAMES[label] for label in order]
        shown = [float(line[f"probability{rank}"]) for rank in range(1, 6)]
        assert shown == pytest.approx(probabilities[number][order], rel=1e-3)
        assert all(line[f"probability{rank}"] == str(np.float32(shown[rank - 1])) for rank in range(1, 6))
        assert line["is_right"] == str(int(best[number] == labels[number]))
    with Image.open(out["confusion-png"]) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
    before = {file: file.read_bytes() for file in out.values()}
    assert "exists already" in fails(capsys, command(weights, images, "--json", out["json"]))
    assert before == {file: file.read_bytes() for file in out.values()}


def test_flip_is_the_mean_of_the_probabilities_of_both_images(weights: Path, images: Path) -> None:
    paths, labels = files_in(images)
    both = [softmax(by_hand(weights, paths, mirrored=mirrored), axis=1) for mirrored in (False, True)]
    mean = np.mean(both, axis=0)
    assert not np.allclose(both[0], both[1], atol=1e-3)
    found = measured(weights, images, "--flip")
    rows = np.arange(len(labels))
    assert found["loss"] == pytest.approx(-np.mean(np.log(mean[rows, labels])), rel=1e-4)
    assert found["top1"] == np.mean(mean.argmax(axis=1) == labels)
    assert found["ece"] == pytest.approx(ece_by_hand(mean.max(axis=1), mean.argmax(axis=1) == labels), rel=1e-3)


def test_several_right_labels_as_in_real(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = files_in(images)
    logits = by_hand(weights, paths)
    rng = np.random.default_rng(0)
    real = [sorted(rng.choice(12, size, replace=False).tolist()) for size in rng.integers(0, 4, len(paths))]
    assert [] in real
    file = tmp_path / "real.json"
    file.write_text(json.dumps(real))
    by_number = sorted(range(len(paths)), key=lambda index: paths[index].name)
    labelled = [(logits[index], set(labels)) for index, labels in zip(by_number, real, strict=True) if labels]
    found = measured(weights, images, "--labels", file, "--per-class-csv", tmp_path / "classes.csv")
    assert found["num_examples"] == len(labelled)
    assert found["num_unlabelled"] == real.count([])
    assert found["top1"] == np.mean([int(row.argmax()) in right for row, right in labelled])
    assert found["top5"] == np.mean([bool(set(np.argsort(-row)[:5].tolist()) & right) for row, right in labelled])
    loss = -np.mean([np.log(softmax(row)[list(right)].sum()) for row, right in labelled])
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert f"{real.count([])} images without a label are left out" in capsys.readouterr().out
    per_class = {line["class"]: line for line in csv.DictReader((tmp_path / "classes.csv").read_text().splitlines())}
    assert int(per_class[NAMES[4]]["num_examples"]) == sum(4 in labels for labels in real)
    assert "several right labels" in fails(
        capsys, command(weights, images, "--labels", file, "--confusion-csv", tmp_path / "confusion.csv")
    )
    for text, message in (
        ("{}", "must be a JSON list"),
        ("[[0], 3]", "entry 2 is 3"),
        ("[[0], [true]]", "entry 2 is [True]"),
        ("[[12]]", "entry 1 has label [12]; the network has 12 outputs"),
        ("[[0]]", "has labels for 1 images, but the set has"),
        ("[[0]", "is no JSON"),
        (json.dumps([[]] * len(paths)), "has no label for any of the 21 images"),
    ):
        file.write_text(text)
        assert message in fails(capsys, command(weights, images, "--labels", file))
    shutil.copytree(images, tmp_path / "named")
    next((tmp_path / "named").glob("*/*")).rename(tmp_path / "named" / NAMES[0] / "cat.jpg")
    file.write_text(json.dumps(real))
    assert "is not named like an image of ImageNet's" in fails(
        capsys, command(weights, tmp_path / "named", "--labels", file)
    )


def test_a_part_of_the_classes_as_in_imagenet_a_and_r(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, labels = files_in(images)
    kept = [0, 1, 2, 3, 4, 5, 6, 9]
    file = tmp_path / "classes.txt"
    file.write_text("".join(f"{NAMES[label]}\n" for label in reversed(kept)))
    part = by_hand(weights, paths)[:, kept]
    found = measured(weights, images, "--classes", file)
    places = np.array([kept.index(label) for label in labels])
    assert found["top1"] == np.mean(part.argmax(axis=1) == places) != measured(weights, images)["top1"]
    assert found["loss"] == pytest.approx(-np.mean(np.log(softmax(part, axis=1)[np.arange(21), places])), rel=1e-4)
    for lines, message in (
        (NAMES[:6], f"does not name class '{NAMES[6]}', which the set has"),
        ((*NAMES, "unicorn"), "names unicorn, which is the name of no output"),
        ((*NAMES, NAMES[3]), f"names '{NAMES[3]}' 2 times"),
        ((), "holds no class name"),
    ):
        file.write_text("\n".join(lines))
        assert message in fails(capsys, command(weights, images, "--classes", file))


def test_folders_named_by_numbers_as_in_v2(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered = write_images(tmp_path / "numbered", [str(number) for number in range(len(NAMES))], 1)
    paths = sorted(numbered.glob("*/*"))
    labels = np.array([int(path.parent.name) for path in paths])
    top1 = float(np.mean(by_hand(weights, paths).argmax(axis=1) == labels))
    text_order = np.array([sorted(map(str, range(12))).index(str(label)) for label in labels])
    assert not np.array_equal(text_order, labels)
    assert measured(weights, numbered, "--class-numbers")["top1"] == top1
    assert "give --class-numbers" in fails(capsys, command(weights, numbered))
    nameless = write_weights(tmp_path / "nameless.safetensors", None)
    assert "numbers of the outputs, give --class-numbers" in fails(capsys, command(nameless, numbered))
    assert measured(nameless, numbered, "--class-numbers")["top1"] == top1
    (numbered / "0").rename(numbered / "12")
    assert "class '12' is unknown" in fails(capsys, command(weights, numbered, "--class-numbers"))


def test_weights_without_class_names_need_them_or_say_what_they_take(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless = write_weights(tmp_path / "nameless.safetensors", None)
    message = "12 outputs and no class names, and the set has 7 classes: give them by --class-names FILE"
    assert message in fails(capsys, command(nameless, images))
    file = tmp_path / "names.txt"
    file.write_text("\ufeff" + "\r\n".join(NAMES) + "\r\n")
    assert measured(nameless, images, "--class-names", file) == measured(weights, images)
    file.write_text("\n".join((*NAMES, "more")))
    assert "has 13 names, but the network has 12 outputs" in fails(
        capsys, command(nameless, images, "--class-names", file)
    )
    file.write_text("\n".join(NAMES[:-1]))  # a short list would shift no name, but leave an output without one
    assert "has 11 names, but the network has 12 outputs: give one name for each output" in fails(
        capsys, command(weights, images, "--class-names", file)
    )
    file.write_text("\n".join(NAMES[::-1]))
    capsys.readouterr()
    measured(weights, images, "--class-names", file)
    assert "replaces the names that the weights have" in capsys.readouterr().err
    whole = write_images(tmp_path / "whole", NAMES, 1)
    capsys.readouterr()
    in_order = measured(nameless, whole)
    assert "the weights have no class names: the 12 classes of the set, in the order" in capsys.readouterr().err
    assert in_order == measured(weights, whole)


def test_settings_are_those_of_the_weights_and_can_be_changed(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unprepared = write_weights(tmp_path / "unprepared.safetensors", prepared=None)
    assert "do not say how images are prepared: give --data.eval-image-size" in fails(
        capsys, command(unprepared, images)
    )
    options: tuple[object, ...] = (
        "--data.eval-image-size",
        24,
        "--data.eval-crop-margin",
        5,
        "--data.eval-keeps-aspect",
    )
    options += ("--data.resampler", "pillow_bicubic", "--data.mean", 100, 110, 120, "--data.std", 50, 55, 60)
    assert measured(unprepared, images, *options) == measured(weights, images)
    assert "does not say how images are prepared; used are eval_image_size 24" in capsys.readouterr().err
    other = measured(weights, images, "--data.eval-image-size", 32)
    assert other["loss"] != measured(weights, images)["loss"]
    capsys.readouterr()
    measured(weights, images, "--data.mean", 0, 0, 0)
    assert (
        "preprocessing: stored -> asked for: mean (100.0, 110.0, 120.0) -> (0.0, 0.0, 0.0)" in capsys.readouterr().err
    )
    with pytest.raises(nfnet_flax.ConfigError, match="do not say how images are prepared: give a DataConfig"):
        evaluate_weights(unprepared, FolderSource(root=str(images), eval="."))


def test_bad_input_is_named(weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--data.source.root", str(images), "--data.source.eval", "."]
    stranger = write_images(tmp_path / "stranger", ("n00", "unicorn"), 1)
    damaged = write_images(tmp_path / "damaged", NAMES[:2], 2)
    broken = damaged / NAMES[0] / "ILSVRC2012_val_00000001.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    many = write_images(tmp_path / "many", [f"class{number}" for number in range(101)], 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for argv, message in (
        (["eval"], "give --workdir DIR or --weights FILE; neither of them are given"),
        (["eval", "--weights", str(weights), "--workdir", "run", *source], "both of them are given"),
        (["eval", "--weights", str(weights)], "--weights: give the images: --data.source.root DIR"),
        (["eval", "--weights", str(tmp_path / "none.safetensors"), *source], "there is no such file or folder"),
        (["eval", "--weights", str(tmp_path / "folder"), *source], "holds neither a run nor weights"),
        (["eval", "--weights", str(weights), "--data.source.root", str(images)], "a single dot if the folders"),
        (command(weights, stranger), "class 'unicorn' is unknown"),
        (command(weights, damaged), f"{broken} (example "),
        (command(weights, tmp_path / "folder"), "has no class folder"),
        (command(weights, images, "--all"), "all = True: goes with --workdir"),
        (command(weights, images, "--checkpoint", "best"), "checkpoint = 'best': goes with --workdir"),
        (command(weights, images, "--parameters", "raw"), "parameters = 'raw': goes with --workdir"),
        (command(weights, images, "--json", tmp_path / "folder"), "is a folder"),
        (command(weights, images, "--json", tmp_path / "file" / "a.json"), "cannot be written"),
        (command(weights, images, "--json", "a", "--per-class-csv", "./a"), "is also given as json"),
        (command(weights, images, "--labels", "none.json"), "labels = 'none.json' cannot be read"),
        (command(weights, images, "--labels", "a", "--classes", "b"), "is of no use with labels"),
        (command(weights, images, "--classes", "gs://bucket/a"), "is a URL"),
        (command(weights, images, "--flop"), "--flop"),
        (command(weights, many, "--confusion-png", tmp_path / "a.png"), "the images have 101 classes, and it can show"),
        (command(weights, images, "--data.num-held-out", "3"), "train"),
    ):
        assert message in fails(capsys, argv), message
    found = measured(weights, damaged, "--data.on-corrupt", "skip")
    assert (found["num_examples"], found["num_corrupt"]) == (3.0, 1.0)
    assert "1 of the 4 held-out images cannot be decoded" in capsys.readouterr().err


def test_timms_folder_is_evaluated_as_by_timm(tmp_path: Path) -> None:
    golden = np.load(GOLDENS / "timm_eval.npz")
    folder, images = tmp_path / "test_nfnet", tmp_path / "images"
    folder.mkdir()
    (folder / "config.json").write_text(str(golden["config"]))
    with np.load(GOLDENS / "timm_test_nfnet.npz") as other:
        shapes: list[tuple[str, list[int]]] = json.loads(str(other["params"]))
    tensors = {
        name: fill(name, tuple(10 if name.startswith("head") and i == 0 else n for i, n in enumerate(shape)))
        for name, shape in shapes
    }
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, overwrite=False)
    for name in golden["names"].tolist():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(golden[Path(name).name].tobytes())
    found = evaluate_weights(folder, FolderSource(root=str(images), eval="."), keeps_logits=True)
    rows = {found.labelled.source.describe(int(index)): row for row, index in enumerate(found.predictions.index)}
    order = [rows[str(images.resolve() / name)] for name in golden["names"].tolist()]
    assert found.predictions.logits is not None
    logits = found.predictions.logits[order]
    assert np.max(np.abs(logits - golden["logits"])) <= 1e-4 * np.max(np.abs(golden["logits"]))
    assert np.array_equal(found.predictions.best[order, 0], golden["logits"].argmax(axis=1))
    info = nfnet_flax.weights.open_weights(folder)[0].preprocessing
    assert info is not None
    settings: dict[str, Any] = {**vars(info), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    pixels = preprocess([(images / name).read_bytes() for name in golden["names"].tolist()], **settings)
    assert np.array_equal(pixels[:, ::5], golden["pixels"])


def test_overflow_counts_as_certain_and_wrong() -> None:
    logits = np.array([[0.0, 1.0, 2.0], [np.nan, 0.0, 0.0]])
    found = predict([logits], [(2,), (0,)], np.arange(2)).metrics()
    assert found["top1"] == found["top5"] == 0.5
    assert not np.isfinite(found["loss"])
    confidence = softmax(logits[0]).max()
    assert found["ece"] == pytest.approx((1 - confidence) / 2 + 1 / 2)
    far = predict([np.array([[0.0, -1000.0]])], [(1,)], np.arange(1))
    assert far.loss.tolist() == [1000.0]
    assert calibration_error(np.array([0.2, 0.2, 1.0]), np.array([True, False, True])) == pytest.approx(0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    process = start(workdir)
    printed = finish(process)
    assert process.returncode == EXIT_DONE, printed
    return workdir


def test_a_run_is_measured_as_in_training_and_all_of_its_checkpoints(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "--workdir", str(run), "--json", "-"]
    assert cli.main(argv) == EXIT_DONE
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["parameters"]) for row in rows] == [(60, "raw"), (60, "ema")]
    wanted = evaluate(run)
    for prefix, row in zip(("eval", "eval_ema"), rows, strict=True):
        for name in ("top1", "top5", "loss"):
            assert row["metrics"][name] == pytest.approx(wanted[f"{prefix}/{name}"], rel=1e-6)
    damage(shutil.copytree(run, tmp_path / "damaged") / "checkpoints" / "40")
    for workdir, num_steps in ((run, len(Run(run).all_steps())), (tmp_path / "damaged", len(Run(run).all_steps()) - 1)):
        assert cli.main(["eval", "--workdir", str(workdir), "--all"]) == EXIT_DONE
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 1 + 2 * num_steps
        assert ("step 40 is left out" in printed.err) == (workdir != run)
    assert re.match(r"step +parameters +top-1 +top-5 +loss +ECE +on 240 examples", printed.out)
    csv_file = str(tmp_path / "a.csv")
    assert "goes with one checkpoint" in fails(
        capsys, ["eval", "--workdir", str(run), "--all", "--per-class-csv", csv_file]
    )
    assert "leave it out with --all" in fails(capsys, ["eval", "--workdir", str(run), "--all", "--checkpoint", "20"])
    assert "is the folder of a run: give --workdir" in fails(
        capsys, ["eval", "--weights", str(run), "--data.source", "DigitsSource"]
    )


def test_weights_of_a_run_are_measured_as_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", "run", str(run), "--out", str(tmp_path)]) == EXIT_DONE
    file, table = str(tmp_path / "weights.safetensors"), tmp_path / "table.json"
    held_out = ["--data.source", "DigitsSource", "--data.num-held-out", "240"]
    assert cli.main(["eval", "--weights", file, *held_out, "--json", str(table)]) == EXIT_DONE
    (row,) = json.loads(table.read_text())
    wanted = evaluate(run)
    for name in ("top1", "top5", "loss"):
        assert row["metrics"][name] == pytest.approx(wanted[f"eval_ema/{name}"], rel=1e-5)
    assert row["metrics"]["num_examples"] == 240


def test_arguments_of_another_kind_are_refused_by_name(weights: Path, images: Path) -> None:
    wrong: Any = str(images)
    calls: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: evaluate_weights(weights, wrong), "images = .*: give a source"),
        (lambda: LabelSet(labels=3), "LabelSet.labels = 3"),  # type: ignore[arg-type]
        (lambda: evaluate_weights(weights, DataConfig(), flip=False), "class '0' is unknown"),
    )
    for call, message in calls:
        with pytest.raises(nfnet_flax.ConfigError, match=message):
            call()
