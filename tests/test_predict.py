"""Predictions of real networks for good, odd and broken files, in Python and by the command."""

import csv
import dataclasses
import html.parser
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import nfnet_flax
from nfnet_flax import cli, columns, weights
from nfnet_flax.config import ConfigError
from nfnet_flax.data.decode import decode
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG
from nfnet_flax.models import NFNetConfig, build_model
from nfnet_flax.prediction import Prediction, Predictor, Unreadable, find_images, load_predictor
from nfnet_flax.prediction.results import Counts, Table
from nfnet_flax.training.reading import Run, export_weights
from nfnet_flax.weights.entries import shapes_of
from nfnet_flax.weights.portable import Activation
from nfnet_flax.weights.timm_folder import folder_files, info_of
from tests.image_sets import image_file
from tests.runs import ROOT, finish, start
from tests.test_cli import fails
from tests.test_odd_files import AS_PILLOW, NAMED
from tests.test_reading import files_in

# Pillow's notes on odd files are not this project's; whatever matters ends in an error.
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")

SHORT = ("--num-steps=4", "--eval-every-steps=4", "--checkpoint.every-steps=2")
NOTED = weights.Preprocessing(
    image_size=16, crop_margin=3, resampler="pillow_bilinear", mean=(120.0, 110.0, 100.0), std=(60.0, 61.0, 62.0)
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Activation, Path]:
    """A run of each kind of objective, made by the real command."""
    folder = tmp_path_factory.mktemp("runs")
    processes = {
        "softmax": start(folder / "softmax", *SHORT),
        "sigmoid": start(folder / "sigmoid", *SHORT, "--objective=SigmoidCrossEntropy"),
    }
    for process in processes.values():
        printed = finish(process)
        assert process.returncode == 0, printed
    return {"softmax": folder / "softmax", "sigmoid": folder / "sigmoid"}


@pytest.fixture(scope="module")
def predictor(runs: dict[Activation, Path]) -> Predictor:
    return load_predictor(runs["softmax"], batch_size=8)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds: `good` has those that can be decoded, `bad` the others."""
    root = tmp_path_factory.mktemp("odd")
    for folder, files in (("good", AS_PILLOW), ("bad", {**NAMED, "text": b"no image", "empty": b""})):
        (root / folder).mkdir()
        for name, content in files.items():
            (root / folder / f"{name}.jpg").write_bytes(content)
    (root / "good" / '<img src=x onerror=alert(1)> & "it\'s".png').write_bytes(image_file(1, "PNG"))
    (root / "good" / "two\nlines.png").write_bytes(image_file(2, "PNG"))
    (root / "good" / "notes.txt").write_text("no image, and not named like one")
    return root


def probabilities(workdir: Path, images: list[bytes | np.ndarray]) -> np.ndarray:
    """What the unfolded network says."""
    preprocessing = read_preprocessing(workdir)
    prepared = jax.numpy.asarray(nfnet_flax.preprocess(images, **dataclasses.asdict(preprocessing)))
    logits = Run(workdir).model("ema")(prepared)
    return np.asarray(jax.nn.softmax(logits))


def read_preprocessing(workdir: Path) -> weights.Preprocessing:
    found = nfnet_flax.load_predictor(workdir).preprocessing
    data = Run(workdir).recipe.data
    assert (found.image_size, found.mean, found.std) == (data.eval_image_size, data.mean, data.std)
    return found


def test_results_are_those_of_the_network(runs: dict[Activation, Path], predictor: Predictor, odd: Path) -> None:
    before = files_in(runs["softmax"])
    paths = [path for path in find_images([odd / "good"]) if isinstance(path, str)]
    assert len(paths) == len(AS_PILLOW) + 2 > 5 * predictor.batch_size
    encoded = [Path(path).read_bytes() for path in paths]
    images: list[Any] = list(paths)
    images[1::4] = map(Path, paths[1::4])
    images[2::4] = encoded[2::4]
    images[3::4] = map(decode, encoded[3::4])
    found = predictor(images)
    wanted = probabilities(runs["softmax"], list(encoded))
    np.testing.assert_allclose([result.probabilities for result in found], wanted, atol=1e-5)
    assert [result.source for result in found[:4]] == [*paths[:2], "images[2]", "images[3]"]
    assert found[0].names == tuple("0123456789")
    assert found[0].top(3) == tuple(
        (str(label), found[0].probabilities[label]) for label in np.argsort(-found[0].probabilities)[:3]
    )
    few = predictor(images[:3])  # other sizes of batches
    np.testing.assert_allclose([result.probabilities for result in few], wanted[:3], atol=1e-5)
    logits = predictor.logits(images[:3])
    np.testing.assert_allclose(jax.nn.softmax(logits), wanted[:3], atol=1e-5)
    assert predictor.features(images[:3]).shape == (3, predictor.network.num_features)
    assert predictor([]) == []
    assert predictor.logits([]).shape == (0, 10)
    assert len(predictor(np.zeros((2, 5, 6, 3), np.uint8))) == 2
    assert files_in(runs["softmax"]) == before


class Page(html.parser.HTMLParser):
    """What a browser sees of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tags[-1][0] if self.tags else "", []).append(data)


def test_good_files_get_results_and_bad_ones_a_line(
    runs: dict[Activation, Path], odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {form: str(tmp_path / f"out.{form}") for form in ("csv", "json", "html")}
    words = [word for form, path in files.items() for word in (f"--{form}", path)]
    run = ("--workdir", str(runs["softmax"]), "--batch-size", "7", "--top", "3")
    assert cli.main(["predict", str(odd / "good"), str(odd / "bad"), *run, *words]) == EXIT_WRONG
    said = capsys.readouterr()
    num_good, num_bad = len(AS_PILLOW) + 2, len(NAMED) + 2
    assert f"\n{num_good} of {num_good + num_bad} images have a result" in said.out
    assert "not used are 1 files whose names end in none of .jpg" in said.err

    with open(files["csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in Path(files["json"]).read_text().splitlines()]
    assert (
        [row["file"] for row in rows]
        == [line["file"] for line in lines]
        == list(find_images([odd]))[num_bad:] + (list(find_images([odd]))[:num_bad])
    )
    assert [bool(row["error"]) for row in rows] == [False] * num_good + [True] * num_bad
    for row, line in zip(rows, lines, strict=True):
        assert line.get("error", "") == row["error"]
        top = [(row[f"class_{rank}"], row[f"probability_{rank}"]) for rank in (1, 2, 3)]
        assert top == [(best["class"], str(best["probability"])) for best in line.get("top", [])] or row["error"]
    errors = {Path(row["file"]).name: row["error"] for row in rows}
    assert errors["empty.jpg"] == "the file is empty (0 bytes)"
    assert errors["text.jpg"].startswith("not an image of a known format")

    page = Page(Path(files["html"]).read_text())
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == num_good
    assert all(source.startswith("data:image/jpeg;base64,/9j/") for source in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    names = "".join(page.texts["h2"])
    assert '<img src=x onerror=alert(1)> & "it\'s".png' in names
    assert "two\\nlines.png" in names
    assert [tag for tag, _ in page.tags].count("article") == num_good + num_bad
    assert [text for text in page.texts["p"] if text in errors.values()] == [row["error"] for row in rows[num_good:]]
    assert "".join(page.texts["b"]).split("%")[0] == f"{100 * float(rows[0]['probability_1']):.2f}"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_table(runs: dict[Activation, Path], odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = str(odd / "good" / "PNG.jpg"), str(odd / "bad" / "text.jpg")
    run = ("--workdir", str(runs["softmax"]), "--checkpoint", "2", "--parameters", "raw")
    assert cli.main(["predict", good, "--top", "2", *run]) == EXIT_DONE
    first, second, row = capsys.readouterr().out.splitlines()
    assert first == "weights: run 'digits', step 2, seed 0, raw parameters"
    assert second.startswith("10 classes, softmax; images of 16 px, resized to a square, area_cubic, mean 123.675")
    best = load_predictor(runs["softmax"], checkpoint=2, parameters="raw")([good])[0].top(2)
    assert row == "  ".join([good, *(f"{name} {value:>7.2%}" for name, value in best)])
    assert cli.main(["predict", bad, good, *run]) == EXIT_WRONG
    said = capsys.readouterr()
    assert said.out.count("\n") == 3
    assert said.err.splitlines() == [
        f"nfnet: {bad}: not an image of a known format (JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM, AVIF): 8 bytes that "
        "begin b'no image'",
        "nfnet: 1 of 2 images have no result",
    ]
    assert cli.main(["predict", good, good, *run, "--json", "-"]) == EXIT_DONE
    said = capsys.readouterr()
    assert [json.loads(line)["file"] for line in said.out.splitlines()] == [good, good]
    assert said.err == "2 of 2 images have a result\n"


def test_independent_classes_get_independent_probabilities(runs: dict[Activation, Path], tmp_path: Path) -> None:
    image = image_file(3)
    export_weights(runs["sigmoid"], tmp_path, parameters="ema")
    for place in (runs["sigmoid"], tmp_path / "weights.safetensors"):
        predictor = load_predictor(place)
        assert predictor.activation == "sigmoid"
        np.testing.assert_allclose(
            predictor([image])[0].probabilities, jax.nn.sigmoid(predictor.logits([image])[0]), atol=1e-6
        )
    steep = load_predictor(runs["sigmoid"], std=(0.1, 0.1, 0.1))
    logits = steep.logits([image])[0].astype(np.float64)
    assert -80 < logits.min() < -40
    np.testing.assert_allclose(steep([image])[0].probabilities, 1 / (1 + np.exp(-logits)), rtol=1e-6)
    changed = load_predictor(runs["sigmoid"], activation="softmax")
    assert changed([image])[0].probabilities.sum() == pytest.approx(1, abs=1e-5)


def small(
    path: Path,
    *,
    preprocessing: weights.Preprocessing | None,
    class_names: tuple[str, ...] = ("cat", "dog"),
    **changes: Any,
) -> Path:
    """Writes weights of a small network."""
    config = NFNetConfig(widths=(8,), depths=(1,), group_width=4, expansion=0.5, **changes)
    model = build_model(config, num_classes=3, rngs=nnx.Rngs(0))
    weights.save_weights(
        path,
        model,
        source="a test",
        parameters="unknown",
        class_names=class_names,
        preprocessing=preprocessing,
    )
    return path


def test_columns_are_aligned_whatever_the_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small(tmp_path / "w.safetensors", preprocessing=NOTED, class_names=("猫", "cafe\u0301", "parrot"))
    files = {"猫の写真.png": 8, "e\u0301.png": 1, "plain.png": 5}  # name -> width without .png
    for seed, file in enumerate(files):
        Path(file).write_bytes(image_file(seed, "PNG"))
    assert cli.main(["predict", *files, "--weights", "w.safetensors", "--top", "3"]) == EXIT_DONE
    rows = capsys.readouterr().out.splitlines()[2:]
    for row, (file, width) in zip(rows, files.items(), strict=True):
        assert row.startswith(file + " " * (8 - width) + "  ")
        for name, width_of_name in (("猫", 2), ("cafe\u0301", 4), ("parrot", 6)):
            assert len(row.partition(name + " " * (6 - width_of_name))[2].partition("%")[0]) == len(" 100.00")


def test_a_terminal_shows_each_image_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names = ("猫" * 20, "dog")
    read_end, write_end = os.openpty()
    with os.fdopen(read_end, "rb", buffering=0) as screen, os.fdopen(write_end, "w") as terminal:
        table = Table(terminal, sys.stderr, 2, names)
        for file in ("写" * 30, "a.png"):
            table.write(Prediction(file, names, np.array([0.75, 0.25], np.float32), None))
        table.finish(Counts(good=2))
        terminal.flush()
        printed = b""
        while printed.count(b"\n") < 2:  # a terminal gives a part at a time
            printed += screen.read(10_000)
    rows = printed.decode().splitlines()
    assert rows == [
        f"...{'写' * 10}   {'猫' * 3}..  75.00%  dog       25.00%",
        f"a.png{' ' * 19}  {'猫' * 3}..  75.00%  dog       25.00%",
    ]
    assert [columns.width_of(row) for row in rows] == [60, 60]


def test_probabilities_are_written_with_all_their_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(image_file(6, "PNG"))
    network = small(tmp_path / "w.safetensors", preprocessing=NOTED)
    std = (0.02, 0.02, 0.02)  # makes some of the probabilities small
    best = load_predictor(network, std=std)([image])[0].top(3)
    assert 0 < best[-1][1] < 1e-6
    words = ["predict", str(image), "--weights", str(network), "--std", "0.02", "0.02", "0.02"]
    assert cli.main([*words, "--json", "-"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)["top"]
    assert [(each["class"], np.float32(each["probability"])) for each in found] == list(best)
    assert cli.main([*words, "--csv", "-"]) == EXIT_DONE
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    for rank, (name, probability) in enumerate(best, 1):
        assert (row[f"class_{rank}"], row[f"probability_{rank}"]) == (name, str(np.float32(probability)))


def test_weights_say_how_images_are_prepared_or_the_user_does(tmp_path: Path) -> None:
    image = decode(image_file(4))
    noted = load_predictor(small(tmp_path / "noted.safetensors", preprocessing=NOTED))
    assert (noted.preprocessing, noted.source) == (NOTED, "a test")
    assert noted.names == ("cat", "dog", "output 2 (no name)")
    bare = small(tmp_path / "bare.safetensors", preprocessing=None)
    with pytest.raises(ConfigError, match=r"do not say .*: give image_size \(--image-size\), mean \(--mean\), std"):
        load_predictor(bare)
    given = load_predictor(bare, **{**dataclasses.asdict(NOTED), "crop_margin": 3})
    assert np.array_equal(given.logits([image]), noted.logits([image]))
    larger = load_predictor(tmp_path / "noted.safetensors", image_size=24)
    assert larger.preprocessing == dataclasses.replace(NOTED, image_size=24)
    grey = small(tmp_path / "grey.safetensors", preprocessing=NOTED, in_channels=1)
    with pytest.raises(ConfigError, match="for images of 1 channels, not for RGB"):
        load_predictor(grey)
    for changes in ({"std": (0.0, 1.0, 1.0)}, {"image_size": 0}, {"crop_margin": -1}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} = "):
            load_predictor(bare, **{"image_size": 16, "mean": (1.0, 1.0, 1.0), "std": (1.0, 1.0, 1.0), **changes})  # type: ignore[arg-type]
    config = nfnet_flax.model_config("test_nfnet")
    network = nnx.eval_shape(lambda: build_model(config, num_classes=2, rngs=nnx.Rngs(0)))
    arrays = {name: np.zeros(shape, np.float32) for name, (shape, _) in shapes_of(network).items()}
    for activation in ("softmax", "sigmoid"):
        info = weights.WeightsInfo(
            model=config, num_classes=2, source="a test", parameters="raw", activation=activation
        )
        assert info_of(folder_files(info, arrays)[0], "").activation == activation


def test_outputs_that_are_not_finite_are_no_probabilities(tmp_path: Path) -> None:
    predictor = load_predictor(small(tmp_path / "w.safetensors", preprocessing=NOTED), std=(1e-38, 1e-38, 1e-38))
    with pytest.raises(ConfigError, match=r"images\[0\]: the network's outputs for it are not finite"):
        predictor([decode(image_file(5))])


def test_what_is_no_image_is_named(predictor: Predictor, tmp_path: Path) -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    wrong: Any
    for wrong, message in (
        ([image, image / 255], r"images\[1\]: is an array of shape \(4, 5, 3\) and type float64: give"),
        ([image[..., 0]], r"images\[0\]: is an array of shape \(4, 5\)"),
        ([np.zeros((0, 5, 3), np.uint8)], r"images\[0\]: is an array of shape \(0, 5, 3\)"),
        ([None], r"images\[0\]: is of type NoneType: give"),
        ([b""], r"images\[0\]: the file is empty"),
        ([str(tmp_path)], r": is a folder: nfnet_flax\.prediction\.find_images"),
        ([tmp_path / "absent.png"], r"absent\.png: cannot be read: No such file"),
        (["a\0b"], "contains a NUL"),
        (image, r"images = 'an array of shape \(4, 5, 3\)': give a list of images"),
        ("photo.jpg", r"images = 'photo\.jpg': give a list"),
        (b"photo", "give a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            predictor(wrong)
    mixed = list(predictor.stream([image, Unreadable("here", "why"), b"x"], thumbnail_px=3))
    assert [type(result) for result in mixed] == [Prediction, Unreadable, Unreadable]
    assert isinstance(mixed[0], Prediction)
    assert decode(mixed[0].thumbnail or b"").shape == (2, 3, 3)


def test_images_are_read_only_when_they_are_needed(predictor: Predictor) -> None:
    num_taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal num_taken
        while True:
            num_taken += 1
            yield np.zeros((4, 4, 3), np.uint8)

    results = predictor.stream(endless())
    for number in range(1, 101):
        next(results)
        assert num_taken <= number + 4 * predictor.batch_size
    results.close()


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/10.jpg", "b/9.jpg", "b/a/1.PNG", "b/.hidden.jpg", "b/x.txt", "p[v2]/1.jpg", "p2/q/1.jpg", "no/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    Path("b/gone.jpg").symlink_to("nowhere")
    Path("b/loop").symlink_to(".", target_is_directory=True)
    Path("b/up").symlink_to("/", target_is_directory=True)
    Path("b/more").symlink_to("../p2", target_is_directory=True)
    os.mkfifo("b/pipe.jpg")
    in_b = ["b/9.jpg", "b/10.jpg", "b/a/1.PNG", "b/more/q/1.jpg"]
    found = find_images(["b/", "b/x.txt"])
    for _ in range(2):
        assert list(found) == [*in_b, "b/x.txt"]
        assert [text.split(", such as")[0].split(" whose")[0] for text in found.unused] == [
            "not used are 1 files",
            "not used are 1 hidden files or folders",
            "not used are 1 links to files that are not there",
            "not used are 2 links to folders that were read before, or in which they lie",
            "not used are 1 things that are neither files nor folders",
        ]
    for places, wanted in (
        (["b/*.jpg"], ["b/9.jpg", "b/10.jpg", "b/gone.jpg", "b/pipe.jpg"]),
        (["p*/**/*.jpg"], ["p2/q/1.jpg", "p[v2]/1.jpg"]),
        (["p2/**"], ["p2/q/1.jpg"]),
        (["p[v2]"], ["p[v2]/1.jpg"]),
        (["p[v2]/?.jpg"], ["p[v2]/1.jpg"]),
        (["p[2]"], ["p2/q/1.jpg"]),
        (["./p2", "p2/q/1.jpg"], ["./p2/q/1.jpg", "p2/q/1.jpg"]),
        ([tmp_path / "b" / "9.jpg"], [str(tmp_path / "b" / "9.jpg")]),
    ):
        assert list(find_images(places)) == wanted, places
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(find_images(["~/p2"])) == [f"{tmp_path}/p2/q/1.jpg"]
    for wrong, message in (
        (["b", "absent"], "images = 'absent': does not exist"),
        (["b/*.gif"], "no file matches this pattern"),
        (["no"], r"there is no image in this folder; it has 1 files whose names end in none of .*, such as 'no/x'"),
        (["https://example.org/x.jpg"], "is a URL"),
        (["b", ""], "images = ''"),
        ([], "give at least one"),
        ("b", "give a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_images(wrong)


def test_bad_input_ends_with_code_2(
    runs: dict[Activation, Path], odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, run = str(odd / "good" / "PNG.jpg"), ("--workdir", str(runs["softmax"]))
    there = tmp_path / "there.csv"
    there.write_text("keep")
    for words, message in (
        ((image,), "--workdir and --weights: neither is given"),
        ((image, *run, "--weights", "x.safetensors"), "both are given"),
        (run, "give files, folders or patterns"),
        (("absent.jpg", *run), "images = 'absent.jpg': does not exist"),
        ((image, "--workdir", str(odd)), "the folder holds no run (no recipe.json)"),
        ((image, "--weights", str(odd / "x.safetensors")), "there is no such file or folder"),
        ((image, "--weights", image), "is no .safetensors file"),
        ((image, "--weights", "x.safetensors", "--checkpoint", "best"), "checkpoint = 'best': is for a run"),
        ((image, *run, "--checkpoint", "3"), "nothing for checkpoint = 3"),
        ((image, *run, "--top", "0"), "top = 0: must be at least 1"),
        ((image, *run, "--batch-size", "0"), "batch_size = 0"),
        ((image, *run, "--csv", str(there)), "exists already: give another name, or replace it by --overwrite"),
        ((image, *run, "--html", str(tmp_path)), "is a folder: give the name of a file"),
        ((image, *run, "--json", str(tmp_path / "no" / "x.json")), "there is no folder"),
        ((image, *run, "--json", f"{tmp_path}/x", "--csv", f"{tmp_path}/x"), "two of them are the same file"),
        ((image, *run, "--json", "-", "--csv", "-"), "only one of them can be the standard output"),
        ((image, *run, "--image-size", "0"), "image_size = 0"),
        ((image, *run, "--resampler", "nearest"), "nearest"),
    ):
        assert message in fails(capsys, "predict", *words), words
    assert files_in(tmp_path) == {"there.csv": b"keep"}
    own = tmp_path / "own.png"
    own.write_bytes((odd / "good" / "PNG.jpg").read_bytes())
    network = small(tmp_path / "own.safetensors", preprocessing=read_preprocessing(runs["softmax"]))
    for given, target, message in (
        (run, own, "is one of the images"),
        (("--weights", str(network)), network, "is also what the command reads"),
    ):
        content = files_in(tmp_path)
        assert message in fails(capsys, "predict", str(own), *given, "--csv", str(target), "--overwrite")
        assert files_in(tmp_path) == content
    assert cli.main(["predict", str(tmp_path), *run, "--csv", str(tmp_path / "beside.csv")]) == EXIT_DONE
    assert "hidden" not in capsys.readouterr().err  # its own unfinished results
    assert cli.main(["predict", image, *run, "--csv", str(there), "--overwrite"]) == EXIT_DONE
    assert there.read_text().startswith("file,class_1,probability_1,")


def test_a_reader_that_goes_away_ends_the_command_quietly(runs: dict[Activation, Path], odd: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    words = ["predict", str(odd / "good"), "--workdir", str(runs["softmax"])]
    done = subprocess.run(
        [sys.executable, "-m", "nfnet_flax.cli", *words],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        text=True,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")
