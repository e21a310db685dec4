"""Images with several classes: metrics against scikit-learn, and a real run whose evaluation has them."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from nfnet_flax import cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import SyntheticSource
from nfnet_flax.debug import debug_recipe
from nfnet_flax.multi_label_metrics import multi_label_metrics
from nfnet_flax.objectives import Distillation, Focal, SigmoidCrossEntropy, SoftmaxCrossEntropy
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.evaluation import evaluated_names
from tests import runs
from tests.image_sets import image_file


@pytest.mark.parametrize("kind", ["any", "ties", "perfect", "one example"])
def test_metrics_are_those_of_scikit_learn(kind: str) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 7)) < 0.3).astype(np.uint8)
    labels[0], labels[:, 3], labels[:, 4] = 1, 0, 1  # no example, and all examples
    logits = rng.standard_normal((60, 7)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "perfect":
        logits = labels - np.float32(0.5)
    elif kind == "one example":
        labels, logits = labels[:1], logits[:1]
    present = labels.any(axis=0)
    true, scores = labels[:, present], logits[:, present]
    want = {
        "mean_average_precision": average_precision_score(true, scores, average="macro"),
        "f1": f1_score(true, scores > 0, average="macro", zero_division=0),
    }
    assert multi_label_metrics(logits, labels) == pytest.approx(want, abs=1e-12)
    if kind == "perfect":
        assert want == {"mean_average_precision": 1.0, "f1": 1.0}


def test_metrics_of_nothing_and_of_what_is_not_finite() -> None:
    nothing = multi_label_metrics(np.zeros((3, 2), np.float32), np.zeros((3, 2), np.uint8))
    assert nothing == {"mean_average_precision": 0.0, "f1": 0.0}
    labels = np.array([[1, 0], [0, 1]], np.uint8)
    broken = multi_label_metrics(np.array([[np.nan, np.nan], [0.5, 0.5]], np.float32), labels)
    assert broken == {"mean_average_precision": 0.75, "f1": 0.5}


def test_names_of_the_metrics() -> None:
    own = ("loss", "top1", "top5")
    for objective in (SigmoidCrossEntropy(), Focal()):
        assert evaluated_names(objective, 5) == own
        both = evaluated_names(objective, 5, is_multi_label=True)
        assert both == (*own, "mean_average_precision", "f1")
        found = objective.evaluate(jnp.zeros((2, 5)), {"label": jnp.zeros((2,), jnp.int32)})
        assert tuple(found) == own  # of one class per example nothing changes


def test_an_objective_for_one_class_is_refused_with_the_remedy() -> None:
    recipe = load_recipe(runs.DIGITS)
    data = DataConfig(source=SyntheticSource(num_classes=10, several_classes=True))
    for objective in (SoftmaxCrossEntropy(), Distillation(teacher="t.safetensors")):
        with pytest.raises(ConfigError, match=r"takes one class per image.*: give SigmoidCrossEntropy or Focal"):
            dataclasses.replace(recipe, data=data, objective=objective)
    best = dataclasses.replace(recipe.checkpoint, best_metric="eval_ema/f1")
    several = dataclasses.replace(recipe, data=data, objective=Focal(), checkpoint=best)
    small = debug_recipe(several)
    assert small.data.source.is_multi_label
    source = small.data.source.open("train", 32)
    assert source[9]["label"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file of 24 images with none to three of three classes, in the order of their names."""
    folder = tmp_path_factory.mktemp("several")
    lines = ["image,tags"]
    for number in range(24):
        (folder / f"{number}.jpg").write_bytes(image_file(number))
        lines.append(f"{number}.jpg,{' '.join(name for bit, name in enumerate('abc') if (number % 8) >> bit & 1)}")
    (folder / "set.csv").write_text("\n".join(lines))
    return folder


def test_a_run_measures_the_metrics_of_the_whole_set(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for option in [*runs.OPTIONS, *runs.SMALL] for word in option.replace("=", " ").split(" ")]
    run = several / "run"
    start = ["train", str(runs.DIGITS), "--workdir", str(run), *words, "--num-steps", "2", "--num-classes", "3"]
    start += ["--data.image-size", "16", "--data.eval-image-size", "16", "--data.batch-size", "8"]
    start += ["--data.eval-batch-size", "8", "--data.num-held-out", "10", "--objective", "SigmoidCrossEntropy"]
    start += [
        "--data.source",
        "CsvSource",
        "--data.source.file",
        str(several / "set.csv"),
        "--data.source.label",
        "tags",
    ]
    start += ["--data.source.separator", " ", "--data.source.allow-none"]
    best = ["--checkpoint.best-metric", "eval_ema/mean_average_precision"]
    assert cli.main([*start, *best, "--num-classes", "4"]) == exit_codes.EXIT_BAD_INPUT
    assert "num_classes = 4: must be 3, the number of classes" in capsys.readouterr().err
    assert cli.main([*start, "--checkpoint.best-metric", "eval/auc"]) == exit_codes.EXIT_BAD_INPUT
    assert "eval_ema/mean_average_precision, eval_ema/f1" in capsys.readouterr().err
    assert cli.main([*start, *best, "--tensorboard"]) == exit_codes.EXIT_DONE
    assert "TensorBoard shows no confusion matrix" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "eval/loss" in row]
    assert row["eval/num_examples"] == 10
    assert 0 < row["eval/mean_average_precision"] <= 1
    capsys.readouterr()
    assert cli.main(["eval", "--workdir", str(run)]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    assert "mean_average_precision" in printed
    assert f"{row['eval/mean_average_precision']:.4f}" in printed
    assert f"{row['eval_ema/f1']:.4f}" in printed
