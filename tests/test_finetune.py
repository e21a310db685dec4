"""`recipes/finetune.py` and `nfnet probe`: what they derive from weights and images, and runs by the real commands."""

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from nfnet_flax import Run, cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.data.source_config import CsvSource, FolderSource, ParquetSource, WebDatasetSource
from nfnet_flax.debug import debug_recipe
from nfnet_flax.finetuning import given_images, sizes_of
from nfnet_flax.models import ImageSizes, TimmNFNetConfig, build_model, model_config
from nfnet_flax.objectives import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.initial import initial_weights
from nfnet_flax.weights import Preprocessing, WeightsInfo, read_weights, save_weights
from tests.image_sets import CLASSES, make_folder
from tests.packed_sets import make_parquet, make_webdataset, plain, table_of, write_tar
from tests.runs import ROOT, finish, signal_at, start

FINETUNE = ROOT / "recipes" / "finetune.py"
MODEL = TimmNFNetConfig(
    widths=(16, 32), depths=(1, 1), stem_width=8, group_width=8, attention="efficient_channel", num_final=48
)
SEEN_AS = Preprocessing(
    image_size=24,
    crop_margin=4,
    resampler="pillow_bicubic",
    mean=(128.0, 127.0, 126.0),
    std=(64.0, 63.0, 62.0),
    keeps_aspect=True,
)
QUICK = ["--num-steps", "2", "--no-tensorboard"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`w.safetensors`, and images of three classes as `split` (a folder with both splits), `plain` and `set.csv`."""
    root = tmp_path_factory.mktemp("given")
    network = build_model(MODEL, num_classes=7, rngs=nnx.Rngs(0))
    names = tuple("abcdefg")
    save_weights(
        root / "w.safetensors", network, source="a test", parameters="ema", class_names=names, preprocessing=SEEN_AS
    )
    make_folder(root / "split", num_train=7, num_val=2)
    shutil.copytree(root / "split" / "train", root / "plain")
    lines = ["file,kind,kinds,part"]
    for path in sorted((root / "split").glob("*/*/*")):
        split, kind = path.parts[-3:-1]
        kinds = f"{kind}|{CLASSES[0]}" if int(path.stem[-1]) % 2 else kind
        lines.append(f"split/{split}/{kind}/{path.name},{kind},{kinds},{split}")
    (root / "set.csv").write_text("\n".join(lines))
    return root


def recipe_for(given: Path, data: str, *arguments: str, weights: Path | None = None) -> Recipe:
    words = [f"weights={(weights or given) / 'w.safetensors'}", f"data={given / data}", *arguments]
    return load_recipe(f"{FINETUNE}:{','.join(words)}")


def test_everything_is_taken_from_weights_and_images(given: Path) -> None:
    recipe = recipe_for(given, "split")
    assert recipe.model == MODEL
    assert (recipe.name, recipe.num_classes) == ("finetune_split", 3)
    data = recipe.data
    assert (data.image_size, data.eval_image_size, data.eval_crop_margin, data.eval_keeps_aspect) == (24, 24, 4, True)
    assert (data.mean, data.std, data.resampler) == (SEEN_AS.mean, SEEN_AS.std, "pillow_bicubic")
    assert (data.source, data.num_held_out) == (FolderSource(root=str(given / "split")), None)
    plain = recipe_for(given, "plain", "flip=false", "batch_size=32", "num_parts=4")
    assert (plain.data.source, plain.data.num_held_out) == (FolderSource(root=str(given / "plain"), train="."), 2)
    assert (plain.data.batch_size, plain.execution.num_microbatches) == (32, 4)
    assert plain.objective == SoftmaxCrossEntropy(label_smoothing=0.1)
    table = recipe_for(given, "set.csv", "image=file", "label=kind", "split_column=part")
    assert isinstance(table.data.source, CsvSource)
    assert (table.num_classes, table.data.num_held_out) == (3, None)
    several = recipe_for(given, "set.csv", "image=file", "label=kinds", "separator=|")
    assert several.data.source.is_multi_label
    assert (several.objective, several.data.num_held_out) == (SigmoidCrossEntropy(), 2)
    assert several.checkpoint.best_metric == "eval_ema/mean_average_precision"
    for small in map(debug_recipe, (recipe, several)):
        assert (small.init_from, small.init_to_zero) == (None, ("head.*",))


def test_folders_of_parquet_and_tar_files_are_recognized(given: Path, tmp_path: Path) -> None:
    hub = make_parquet(given / "split", tmp_path / "hub")
    recipe = recipe_for(tmp_path, "hub", weights=given)
    assert recipe.data.source == ParquetSource(root=str(hub))
    assert (recipe.num_classes, recipe.data.num_held_out, recipe.name) == (3, None, "finetune_hub")
    for path in hub.glob("*/validation-*"):
        path.rename(path.with_name(path.name.replace("validation", "test")))
    assert recipe_for(tmp_path, "hub", weights=given).data.source == ParquetSource(root=str(hub), eval=("test",))
    one = plain(table_of(sorted((given / "plain").glob("*/*")), None), tmp_path / "flat" / "my.parquet")
    flat = recipe_for(tmp_path, "flat", weights=given)
    assert (flat.data.source, flat.data.num_held_out) == (ParquetSource(root=str(one.parent), train=(".",)), 2)
    alone = recipe_for(tmp_path, "flat/my.parquet", weights=given).data
    assert (alone.source, alone.num_held_out) == (ParquetSource(root=str(one.parent), train=("my.parquet",)), 2)

    tars = make_webdataset(given / "split", tmp_path / "tars")
    assert recipe_for(tmp_path, "tars", weights=given).data.source == WebDatasetSource(root=str(tars))
    with pytest.raises(ConfigError, match=r"separator = '\|': only a \.csv file has it"):
        recipe_for(tmp_path, "tars", "separator=|", weights=given)
    for path in tars.glob("*train*"):
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"source\.train = 'train': .* has no tar file of that split.*there is tiny-val"
    ):
        recipe_for(tmp_path, "tars", weights=given)
    shutil.copytree(given / "split", tmp_path / "photos")
    write_tar(tmp_path / "photos" / "copy.tar", [])  # of the folder, beside its classes
    source = recipe_for(tmp_path, "photos", weights=given).data.source
    assert source == FolderSource(root=str(tmp_path / "photos"))


def test_published_sizes_and_unknown_ones() -> None:
    light = WeightsInfo(
        model=model_config("eca_nfnet_l0", drop_rate=0.3), num_classes=1000, source="light", parameters="ema"
    )
    sizes, seen_as = sizes_of(light)
    assert (sizes, seen_as.image_size) == (ImageSizes(train=224, test=288), 288)
    other = dataclasses.replace(light, preprocessing=SEEN_AS)
    assert sizes_of(other)[0] == ImageSizes(train=24, test=24)
    with pytest.raises(ConfigError, match=r"weights = 'mine': says nothing about its images"):
        sizes_of(dataclasses.replace(light, model=MODEL, source="mine"))


def test_the_head_starts_at_zero_and_all_else_as_given(given: Path) -> None:
    recipe = recipe_for(given, "split")
    found = initial_weights(recipe, CLASSES)
    stored = read_weights(given / "w.safetensors")[1]
    assert found.arrays.keys() == stored.keys()
    for name, value in found.arrays.items():
        want = np.zeros((48, 3) if name == "head.kernel" else (3,)) if name.startswith("head.") else stored[name]
        assert np.array_equal(value, want), name
    random = dataclasses.replace(recipe, init_from=None)
    assert initial_weights(random, CLASSES).arrays.keys() == {"head.kernel", "head.bias"}
    with pytest.raises(ConfigError, match=r"init_to_zero: pattern 'tail\.\*' matches no parameter"):
        initial_weights(dataclasses.replace(random, init_to_zero=("tail.*",)), CLASSES)


def test_a_folder_is_fine_tuned_and_evaluated_and_converted(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"{FINETUNE}:weights={given / 'w.safetensors'},data={given / 'plain'},batch_size=16,num_parts=8"
    run = given / "run"
    options = [*QUICK, "--num-steps", "3", "--optim.trained-from-epoch.1.value", "1.5"]
    assert cli.main(["train", recipe, "--workdir", str(run), *options]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    assert "from epoch 1.5" in printed
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/num_examples"] == 2
    assert Run(run).class_names == CLASSES
    stored, weights = read_weights(given / "w.safetensors")[1], Run(run).weights("raw")
    moved = [name for name, value in stored.items() if name not in weights or not np.array_equal(value, weights[name])]
    assert (
        "stem.0.kernel" in moved
    )  # 19 images in batches of 16: the second epoch and a half begins with the third step
    assert np.any(weights["head.kernel"])
    assert cli.main(["convert", "run", str(run), "--out", str(given / "out")]) == exit_codes.EXIT_DONE
    info, _ = read_weights(given / "out" / "weights.safetensors")
    assert (info.class_names, info.preprocessing) == (CLASSES, SEEN_AS)
    # The result is weights again, for a run or a probe.
    again = load_recipe(f"{FINETUNE}:weights={run},data={given / 'split'}")
    assert again.model == MODEL


def test_images_with_several_classes_go_through_all_commands(
    given: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(given)
    recipe = f"{FINETUNE}:weights=w.safetensors,data=set.csv,image=file,label=kinds,separator=|,batch_size=8"
    stopped = start(given / "several", "--num-steps=5000", recipe=Path(recipe))
    printed = signal_at(stopped, 2, signal.SIGTERM)
    assert stopped.returncode == exit_codes.EXIT_STOPPED, printed
    last_step = Run(given / "several").steps()[0] + 2
    resumed = start(given / "several", f"--num-steps={last_step}", recipe=Path(recipe))
    printed = finish(resumed)
    assert resumed.returncode == exit_codes.EXIT_DONE, printed
    assert f"continuing from step {last_step - 2}" in printed
    evaluated = rf"step {last_step}: top-1 .*; mean_average_precision [\d.]+ raw, [\d.]+ EMA on 2 held-out examples"
    assert re.search(evaluated, printed), printed
    run = ["--workdir", "several"]
    assert cli.main(["eval", *run, "--json", "-"]) == exit_codes.EXIT_DONE
    raw, _ = json.loads(capsys.readouterr().out)
    last = json.loads((given / "several" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "top1", "mean_average_precision", "f1"):
        assert raw["metrics"][name] == last[f"eval/{name}"]
    assert cli.main(["predict", "plain", *run, "--json", "-"]) == exit_codes.EXIT_DONE
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 21
    assert any(abs(sum(best["probability"] for best in row["top"]) - 1) > 0.1 for row in rows)  # no softmax
    assert cli.main(["export", *run, "--to", "safetensors", "--out", "served"]) == exit_codes.EXIT_DONE
    described = json.loads((given / "served" / "weights.folded.safetensors.json").read_text())
    assert '"activation": "sigmoid"' in json.dumps(described)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("data=photos", "needs values for weights: give "),
        ("weights=w.safetensors", "needs values for data: give "),
        ("weights=gone.safetensors,data=split", "gone.safetensors"),
        ("weights=w.safetensors,data=gone", "give a folder of images, or of Parquet or tar files, or a .csv file"),
        ("weights=w.safetensors,data=gone.csv", "gone.csv' is no file"),
        ("weights=w.safetensors,data=set.csv", "there is no column 'image'; there are 'file', 'kind', 'kinds', 'part'"),
        ("weights=w.safetensors,data=split,batch_size=many", "takes batch_size = 'many': expected int"),
        ("weights=w.safetensors,data=split,speed=2", "no parameter 'speed'"),
    ],
)
def test_bad_input_ends_with_code_2(
    given: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(given)
    assert cli.main(["train", f"{FINETUNE}:{arguments}", "--workdir", "unused"]) == exit_codes.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (given / "unused").exists()


def test_a_probe_says_what_the_features_are_worth(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--weights", str(given / "w.safetensors")]
    assert cli.main(["probe", str(given / "split"), *weights, "--shots", "1", "5", "90"]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    assert "a test: 48 features, logistic regression for 3 classes" in printed
    assert "on 6 held-out images" in printed
    rows = [line.split() for line in printed.splitlines()[2:-1]]
    assert [row[:2] for row in rows] == [["-", "0"], ["1", "3"], ["5", "15"], ["all", "21"]]
    table = ["probe", str(given / "set.csv"), *weights, "--image", "file", "--label", "kind"]
    split = ["--split-column", "part"]
    assert cli.main([*table, *split, "--shots", "2"]) == exit_codes.EXIT_DONE
    assert capsys.readouterr().out.splitlines()[-2].split()[:3] == rows[-1][:3]  # the same images and features
    for wrong, message in (
        (
            ["probe", str(given / "gone"), *weights],
            "give a folder of images, or of Parquet or tar files, or a .csv file",
        ),
        (["probe", str(given / "split"), "--weights", "gone.safetensors"], "gone.safetensors"),
        ([*table, "--shots", "0"], "shots = 0: must be at least 1"),
        ([*table, "--max-train", "1"], "max_train = 1: these images are all of one class"),
    ):
        assert cli.main(wrong) == exit_codes.EXIT_BAD_INPUT
        assert message in capsys.readouterr().err


def test_a_probe_takes_one_class_per_image(given: Path) -> None:
    from nfnet_flax.probe import probe

    images = given_images(str(given / "set.csv"), image="file", label="kinds", separator="|")
    info, arrays = read_weights(given / "w.safetensors")
    with pytest.raises(ConfigError, match="a probe takes one class per image"):
        probe(info, arrays, images)
