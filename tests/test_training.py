"""Real runs of the digits recipe through the command line: every family learns, starts from weights, goes on."""

import functools
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nfnet_flax import cli, exit_codes, weights
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.weights.entries import arrays_of
from tests import runs
from tests.test_weights import with_random_arrays

# One line instead of the recipe's network; NFNet itself is trained by test_resume.py.
NFNET = "NFNetConfig(widths=(32,), depths=(1,), group_width=8)"
MODELS = {
    "nf_resnet": "NFResNetConfig(widths=(32, 64), depths=(1, 1), stem_width=16, se_ratio=0.25)",
    "nf_regnet": "NFRegNetConfig(widths=(32, 48), depths=(1, 1), drop_rate=0.1)",
    "resnet": "ResNetConfig(widths=(32, 64), depths=(1, 1), stem_width=16)",
    "efficientnet": "EfficientNetConfig(width_multiplier=0.25, depth_multiplier=0.3)",
}
NUM_STEPS = 90
OPTIONS = [
    *("--num-steps", str(NUM_STEPS), "--optim.clipping.ratio", "0.2"),
    *("--log-every-steps", "1", "--eval-every-steps", "40", "--checkpoint.every-steps", "40"),
    *("--data.image-size", "16", "--data.eval-image-size", "16", "--data.batch-size", "32"),
    *("--execution.num-microbatches", "2", "--data.num-held-out", "64"),
]


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The recipe of a family; its run, made when first asked for, lies beside it."""

    @functools.cache
    def recipe_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        recipe = runs.recipe_with(MODELS[family], folder)
        assert cli.main(["train", str(recipe), "--workdir", str(folder / "run"), *OPTIONS]) == exit_codes.EXIT_DONE
        return recipe

    return recipe_of


@pytest.mark.parametrize("family", MODELS)
def test_a_small_member_of_every_family_learns(family: str, finished: Callable[[str], Path]) -> None:
    found = losses(finished(family).parent / "run")
    assert len(found) == NUM_STEPS
    assert np.mean(found[-10:]) < np.mean(found[:10]) - 0.1


def test_a_batch_norm_run_resumes_to_the_bit(finished: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = finished("resnet")
    runs.signal_at(runs.start(tmp_path, *OPTIONS, recipe=recipe), 9, signal.SIGTERM)
    assert (step_of_stop := max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())) < 40
    resumed = runs.start(tmp_path, *OPTIONS, recipe=recipe)
    assert f"continuing from step {step_of_stop} " in runs.finish(resumed)
    whole = recipe.parent / "run"
    want, got = (runs.saved_arrays(folder, NUM_STEPS) for folder in (whole, tmp_path))
    assert int(want["['batch_stats']['final_bn.count']"]) == NUM_STEPS
    assert not np.array_equal(want["['batch_stats']['final_bn.mean']"], want["['ema_batch_stats']['final_bn.mean']"])
    assert want.keys() == got.keys()
    assert [name for name in want if want[name].tobytes() != got[name].tobytes()] == []
    assert losses(whole) == losses(tmp_path)


def test_a_run_starts_from_weights_and_exports_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(runs.recipe_with(NFNET, tmp_path))
    config = load_recipe(recipe).model
    model = with_random_arrays(config, 5)
    weights.save_weights(tmp_path / "start.safetensors", model, source="a test", parameters="raw")
    start = ["--init-from", str(tmp_path / "start.safetensors")]
    run = ["train", recipe, "--workdir", str(tmp_path / "run"), "--num-steps", "1"]
    assert cli.main([*run, *start]) == exit_codes.EXIT_BAD_INPUT
    assert "has a head of 5 classes, not 10" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main([*run, *start, "--init-from-skip", "head.*"]) == exit_codes.EXIT_DONE
    # The learning rate of the first step is 0, so all but the head is still what the file holds.
    for parameters in ("raw", "ema"):
        out = tmp_path / parameters
        done = cli.main(["convert", "run", str(tmp_path / "run"), "--out", str(out), "--parameters", parameters])
        assert done == exit_codes.EXIT_DONE
        info, exported = weights.read_weights(out / "weights.safetensors")
        assert (info.model, info.num_classes, info.parameters) == (config, 10, parameters)
        assert info.source == "run 'digits', step 1, seed 0"
        stored = arrays_of(model)
        assert exported.keys() == stored.keys()
        for name in stored.keys() - {"head.kernel", "head.bias"}:
            np.testing.assert_allclose(exported[name], stored[name], rtol=1e-6)
        assert exported["head.kernel"].shape == (64, 10)


def test_without_tensorflow_training_goes_on(tmp_path: Path) -> None:
    # Python's own finder no longer sees it, as in an environment without it.
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find_spec = PathFinder.find_spec\n"
        "def find(name, path=None, target=None):\n"
        "    return None if name.split('.')[0] == 'tensorflow' else find_spec(name, path, target)\n"
        "PathFinder.find_spec = find\n"
    )
    done = subprocess.run(
        runs.command(tmp_path / "run", *OPTIONS, "--tensorboard", recipe=runs.recipe_with(MODELS["resnet"], tmp_path)),
        env={**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        cwd=runs.ROOT,
    )
    assert done.returncode == exit_codes.EXIT_DONE, done.stderr
    assert done.stderr.count("only metrics.jsonl is written") == 1
    assert "Traceback" not in done.stderr
    assert len(losses(tmp_path / "run")) == NUM_STEPS
    assert not list((tmp_path / "run").glob("tensorboard/*"))
