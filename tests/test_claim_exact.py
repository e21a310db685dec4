"""`nfnet claim exact`: sizes, logits and accuracy beside the published ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from nfnet_flax import cli
from nfnet_flax.claims import published
from nfnet_flax.claims.evidence import read_evidence
from nfnet_flax.claims.exact import tables, text
from nfnet_flax.claims.released import WeightFile, weight_files
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG
from nfnet_flax.models import IMAGE_SIZES, NFNetConfig, build_model, model_config
from nfnet_flax.models.params import update
from nfnet_flax.models.registry import VARIANTS
from nfnet_flax.weights import Preprocessing, save_weights, to_timm
from nfnet_flax.weights.files import write_safetensors
from tests import golden, image_sets
from tests.runs import ROOT
from tests.test_cli import fails

CLASSES = image_sets.CLASSES
EVIDENCE = ROOT / "docs" / "claims" / "exact.json"


def measured(tmp_path: Path, *options: object) -> dict[str, Any]:
    """What the command measures, of one network besides."""
    words = ["claim", "exact", "--models", "nf_regnet_b0", "--out", str(tmp_path / "out"), *map(str, options)]
    assert cli.main(words) == EXIT_DONE
    found = read_evidence(tmp_path / "out" / "evidence.json", "exact")
    assert found.command == f"nfnet {' '.join(words)}"
    return found.data


def test_sizes_are_counted_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["nfnet_f0", "nf_resnet50", "efficientnet_b2"]
    assert cli.main(["claim", "exact", "--models", *words, "--out", str(tmp_path)]) == EXIT_DONE
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:8] for row in rows if row[0:1] and row[0] in words}
    assert found["nfnet_f0"] == ["71,489,284", "71,489,284", "0", "256", "12.384B", "12.38B", "+0.034% (rounding)"]
    assert found["nf_resnet50"] == ["25,557,048", "25,557,048", "0", "224", "4.089B", "", ""]
    assert found["efficientnet_b2"][:3] == ["9,109,994", "9.2M", "-0.978%"]
    data = read_evidence(tmp_path / "evidence.json", "exact").data
    assert [entry["model"] for entry in data["sizes"]] == words
    assert (data["logits"], data["accuracy"]) == ([], [])


def test_the_page_has_every_network_with_a_published_figure() -> None:
    """Parameters of the published code are ours, and FLOPs of its paper are ours, rounded."""
    found = read_evidence(EVIDENCE, "exact")
    sizes = {entry["model"]: entry for entry in found.data["sizes"]}
    assert list(sizes) == list(published.SIZES)
    for name, known in published.SIZES.items():
        if known.source.startswith("code"):
            assert known.parameters is not None
            assert sizes[name]["parameters"] == known.parameters.value
        if name.startswith("nfnet") and known.multiply_adds is not None:
            assert known.multiply_adds.contains(sizes[name]["multiply_adds"])
    assert "NO" not in tables(found)["logits"]
    for entry in found.data["logits"]:
        assert entry["difference"]["float64"] < 1e-12
        assert entry["num_parameters"] == golden.load(entry["golden"])["meta"]["num_params"]


def test_published_figures_are_of_networks_that_there_are() -> None:
    assert set(published.SIZES) <= set(VARIANTS)
    figure = published.Figure("12.38B")
    assert figure.value == 12.38e9
    assert (figure.contains(12.3849e9), figure.contains(12.386e9)) == (True, False)
    assert published.Figure("71,489,284").value == 71_489_284


def test_logits_are_compared_with_goldens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goldens = tmp_path / "goldens"
    goldens.mkdir()
    shutil.copy(golden.FOLDER / "nfnet_tiny.npz", goldens)
    (entry,) = measured(tmp_path, "--goldens", goldens)["logits"]
    assert (entry["golden"], entry["num_parameters"], entry["has_same_parameters"]) == ("nfnet_tiny", 250_704, True)
    assert entry["difference"]["float32"] < 1e-5
    assert entry["difference"]["float64"] < 1e-12
    printed = capsys.readouterr().out
    assert "| nfnet_tiny | 250,704 | yes |" in printed
    assert "Accuracy: left out" in printed
    (goldens / "nfnet_tiny.npz").write_bytes(b"PK")
    assert "nfnet_tiny.npz' is damaged" in fails(capsys, "claim", "exact", "--goldens", str(goldens))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A named network that `nfnet convert` wrote, and one that says itself how images are prepared."""
    folder = tmp_path_factory.mktemp("weights")
    given = folder.parent / "of_timm.safetensors"
    named = build_model(model_config("test_nfnet"), num_classes=len(CLASSES), rngs=nnx.Rngs(0))
    update(named, {"head.bias": jnp.asarray([0.0, 0.1, 0.0])})
    write_safetensors(given, to_timm(named), {}, overwrite=False)
    assert cli.main(["convert", "timm", str(given), "--model", "test_nfnet", "--out", str(folder)]) == EXIT_DONE
    small = build_model(
        NFNetConfig(widths=(8,), depths=(1,), group_width=4), num_classes=len(CLASSES), rngs=nnx.Rngs(0)
    )
    seen_as = Preprocessing(image_size=24, crop_margin=4, resampler="area_cubic", mean=(100.0,) * 3, std=(50.0,) * 3)
    save_weights(
        folder / "a_run.safetensors",
        small,
        source="a test",
        parameters="ema",
        class_names=CLASSES,
        preprocessing=seen_as,
    )
    return folder


def test_accuracy_is_that_of_nfnet_eval(
    tmp_path: Path, weights: Path, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, named = measured(tmp_path, "--weights", weights, "--images", sets / "folder")["accuracy"]
    assert (own["model"], own["preparation"], own["image_size"], own["num_examples"]) == (None, "recorded", 24, 6)
    size = IMAGE_SIZES["test_nfnet"].test
    assert (named["model"], named["preparation"], named["image_size"]) == ("test_nfnet", "published", size)
    assert f"| test_nfnet.safetensors | test_nfnet | {size} | 6 | {named['top1']:.2%} |  |" in capsys.readouterr().out
    for entry, options in ((own, []), (named, [f"--data.eval-image-size={size}", "--data.eval-crop-margin=32"])):
        words = ["--weights", str(weights / entry["weights"]), "--data.source.root", str(sets / "folder"), *options]
        assert cli.main(["eval", *words, "--json", str(tmp_path / "eval.json"), "--overwrite"]) == EXIT_DONE
        (row,) = json.loads((tmp_path / "eval.json").read_text())
        assert (row["metrics"]["top1"], row["metrics"]["top5"]) == (entry["top1"], entry["top5"])


def test_a_file_that_does_not_fit_is_named_and_the_others_are_measured(
    tmp_path: Path, weights: Path, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "weights", tmp_path / "out"
    folder.mkdir()
    (folder / "a_damaged.safetensors").write_bytes(b"{}")
    shutil.copy(weights / "a_run.safetensors", folder)
    shutil.copy(weights.parent / "of_timm.safetensors", folder / "dm_nfnet_f0.safetensors")  # it is of test_nfnet
    words = ["--models", "nf_regnet_b0", "--weights", str(folder), "--images", str(sets / "folder"), "--out", str(out)]
    assert cli.main(["claim", "exact", *words]) == EXIT_WRONG
    assert [entry["weights"] for entry in read_evidence(out / "evidence.json", "exact").data["accuracy"]] == [
        "a_run.safetensors"
    ]
    printed = capsys.readouterr()
    assert f"{folder}/dm_nfnet_f0.safetensors: the timm state dict does not fit the model: " in printed.err
    assert "and its name says nfnet_f0: rename it, or take it out of the folder (" in printed.err
    assert "with skip" not in printed.err
    last = "nfnet: without a result: a_damaged.safetensors, dm_nfnet_f0.safetensors; the reasons are said above"
    assert printed.err.splitlines()[-1] == last
    assert printed.out.endswith(f"\n\nwritten: {out}/evidence.json\n")


@pytest.mark.parametrize("layout", ["folder/val", "array_record", "parquet", "webdataset"])
def test_every_layout_gives_the_same(tmp_path: Path, weights: Path, sets: Path, layout: str) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(weights / "a_run.safetensors", folder)
    found = [measured(tmp_path, "--weights", folder, "--images", sets / name) for name in ("folder", layout)]
    assert found[0]["accuracy"] == found[1]["accuracy"]


def test_released_files_are_known_by_their_names(tmp_path: Path) -> None:
    names = ["F0_haiku.npz", "F6_haiku.npz", "dm_nfnet_f1-fc540f82.safetensors", "dm_nfnet_f2.dm_in1k.safetensors"]
    for name in (*names, "mine.safetensors", "notes.txt", "F1_haiku.npz.part"):
        (tmp_path / name).write_bytes(b"")
    hub = tmp_path / "timm_folder"
    hub.mkdir()
    for name in ("config.json", "model.safetensors"):
        (hub / name).write_bytes(b"")
    found = {file.path.name: (file.form, file.model) for file in weight_files(tmp_path)}
    assert found == {
        "F0_haiku.npz": ("haiku", "nfnet_f0"),
        "F6_haiku.npz": ("haiku", "nfnet_f6"),
        "dm_nfnet_f1-fc540f82.safetensors": ("timm", "nfnet_f1"),
        "dm_nfnet_f2.dm_in1k.safetensors": ("timm", "nfnet_f2"),
        "mine.safetensors": ("described", None),
        "timm_folder": ("described", None),
    }
    assert isinstance(weight_files(tmp_path)[0], WeightFile)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "nfnet_f9"], "unknown model 'nfnet_f9': known are nfnet_f"),
        (["--models", "nfnet_f1+"], "models: 'nfnet_f1+' has no published figure on record; known are nfnet_f0,"),
        (["--goldens", "{empty}"], "holds none of nfnet_tiny.npz,"),
        (["--weights", "{empty}"], "give --images DIR, too, or leave it out"),
        (["--images", "{empty}"], "give --weights DIR, too, or leave it out"),
        (["--weights", "{empty}", "--images", "{empty}"], "holds no weight file: put F0_haiku.npz,"),
        (["--weights", "absent", "--images", "{empty}"], "is no folder: give the one in which the weight files lie"),
        (
            ["--weights", "{weights}", "--images", "absent"],
            "images = 'absent': does not exist: give a folder",
        ),
        (["--weights", "{weights}", "--images", "{empty}", "--models", "nf_resnet50"], "has no class folder"),
        (["--out", "{weights}/a_run.safetensors"], "cannot be made (File exists): give another folder"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    words = [word.format(empty=tmp_path, weights=weights) for word in options]
    assert message in fails(capsys, "claim", "exact", *words)


def test_what_was_left_out_is_said() -> None:
    found = read_evidence(EVIDENCE, "exact")
    found.data["logits"] = []
    assert list(tables(found)) == ["sizes"]
    assert "Logits: left out. With --goldens tests/goldens" in text(found)
