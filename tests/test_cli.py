"""The command line: what a user types, and mistypes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nfnet_flax import cli, exit_codes
from tests import runs
from tests.image_sets import image_file

RECIPE = str(runs.ROOT / "recipes" / "digits.py")


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must end with exit code 2, a message, and no traceback."""
    try:
        code = cli.main(argv)
    except SystemExit as error:  # tyro's own
        code = error.code  # type: ignore[assignment]
    printed = "".join(capsys.readouterr())
    assert code == exit_codes.EXIT_BAD_INPUT, printed
    assert "Traceback" not in printed
    return " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--optim.learning-rate-per-256", "inf", "OptimConfig.learning_rate_per_256 = inf: must be finite"),
        ("--optim.weight-decay", "nan", "OptimConfig.weight_decay = nan: must be finite"),
        ("--optim.clipping.ratio", "1e39", "AGC.ratio = 1e+39: must be finite, and at most 3.4e+38"),
        ("--optim.warmup-epochs", "1e30", "optim.warmup_epochs = 1e+30: these are 2.25e+31 steps: give at most"),
        ("--data.std", "1 1 inf", "DataConfig.std = inf: must be finite"),
        ("--data.stall-timeout-s", "inf", "DataConfig.stall_timeout_s = inf: must be finite"),
        ("--watchdog.timeout-s", "inf", "WatchdogConfig.timeout_s = inf: must be finite"),
        ("--checkpoint.every-minutes", "inf", "CheckpointConfig.every_minutes = inf: must be finite"),
        ("--num-steps", "3000000000", "num_steps = 3000000000: must be at least 1 and at most 2,147,483,647"),
        ("--num-steps", "9223372036854775808", "Recipe.num_steps = 9223372036854775808: is beyond 64 bits"),
        ("--num-epochs", "1e30", "num_epochs = 1e+30: these are 2.25e+31 steps of 1,437 examples"),
        ("--num-classes", "4294967296", "num_classes = 4294967296: must be 2 to 2,147,483,647"),
        ("--model.widths", "8 8 8 4294967296", "model.widths = (8, 8, 8, 4294967296): every stage"),
        ("--data.image-size", "1000000", "data.image_size = 1000000: must be at least 1 and at most 65,500"),
        ("--data.image-size", "60000", "data.batch_size = 64: data.prefetch_batches = 4 of such batches of 60000 px"),
        ("--data.eval-image-size", "65501", "data.eval_image_size = 65501: must be at least 1 and at most 65,500"),
        ("--data.eval-crop-margin", "65500", "data.eval_crop_margin = 65500: must be at most"),
        ("--data.batch-size", "4294967296", "data.batch_size = 4294967296: must be at least 1 and at most"),
        ("--data.batch-size", "2000000000", "data.batch_size = 2000000000: data.prefetch_batches = 4 of such batches"),
        ("--data.eval-batch-size", "2000000000", "data.eval_batch_size = 2000000000: data.prefetch_batches = 4 of"),
        ("--data.num-threads", "1000000", "data.num_threads = 1000000: must be at least 1 and at most 4,096"),
    ],
)
def test_a_number_beyond_what_computes_with_it_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str, message: str
) -> None:
    workdir = tmp_path / "run"
    assert message in fails(capsys, "train", RECIPE, "--workdir", str(workdir), option, *value.split())
    assert not workdir.exists() or [path.name for path in workdir.iterdir()] == []


def test_bad_input_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    workdir = str(tmp_path / "run")
    assert "'nowhere.py' does not exist" in fails(capsys, "train", "nowhere.py", "--workdir", workdir)
    unknown = fails(capsys, "train", RECIPE, "--workdir", workdir, "--optim.cliping", "0.1")
    assert "optim.clipping" in unknown
    wrong = fails(capsys, "train", RECIPE, "--workdir", workdir, "--data.batch-size", "many")
    assert "batch-size" in wrong
    assert "many" in wrong
    invalid = fails(capsys, "train", RECIPE, "--workdir", workdir, "--optim.method.momentum", "1.5")
    assert "optim.method.momentum = 1.5" in invalid
    assert "workdir" in fails(capsys, "train", RECIPE)
    for name, message in (
        ("top1", "checkpoint.best_metric = 'top1': give eval/NAME or eval_ema/NAME"),
        (
            "eval/hits",
            "SoftmaxCrossEntropy does not compute it: give one of eval/loss, eval/top1, eval/top5, eval_ema/loss",
        ),
    ):
        assert message in fails(capsys, "train", RECIPE, "--workdir", workdir, "--checkpoint.best-metric", name)
    assert "unknown command 'trian'" in fails(capsys, "trian")
    assert not (tmp_path / "run").exists()


def test_a_mistyped_command_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, message in (
        ("tarin", "known are train, ... (nfnet --help lists all)"),
        ("preditc", "known are predict, probe, ... (nfnet --help lists all)"),
        ("xyzzy", "nfnet --help lists the known ones"),
    ):
        assert fails(capsys, typed) == f"nfnet: error: unknown command {typed!r}: {message}"


def test_a_file_whose_name_begins_with_a_dash_is_answered_with_its_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    note = "a file whose name begins with a dash is given as ./-dash"
    commands = (
        ["predict", "-dash"],
        ["predict", "photo.png", "--workdir", "run", "--csv", "-dash"],
        ["train", "-dash"],
        ["train", "-dash:variant=f3"],
        ["train", RECIPE, "--workdir", "-dash"],
        ["convert", "haiku", "-dash", "--model", "nfnet_f0", "--out", "weights"],
        ["report", "-dash"],
        ["probe", "-dash"],
    )
    for words in commands:
        assert note not in fails(capsys, *words), words
    Path("-dash").touch()
    for words in commands:
        assert note in fails(capsys, *words), words
    assert note not in fails(capsys, "predict", "./-dash", "--workdir", "run")


def test_a_folder_without_a_run_is_named_with_the_remedy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "lost" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("no run")
    image = tmp_path / "photo.png"
    image.write_bytes(image_file(0, "PNG"))
    remedy = "give the folder of a run, which nfnet train --workdir DIR made"
    for place, message in (
        ("gone", f"there is no such folder: {remedy}"),
        ("empty", f"the folder holds no run (no recipe.json): {remedy}"),
        ("file", f"is a file: {remedy}"),
        ("lost", "the folder holds checkpoints, but no recipe.json: put it back, or start nfnet train with the run's"),
    ):
        folder = str(tmp_path / place)
        for words in (
            ["eval", "--workdir", folder],
            ["predict", str(image), "--workdir", folder],
            ["export", "--workdir", folder, "--to", "onnx", "--out", "unused"],
            ["convert", "run", folder, "--out", "unused"],
            ["convert", "run", folder, "--out", "unused", "--to", "hub-folder"],
        ):
            assert f"workdir = {folder!r}: {message}" in fails(capsys, *words)
        if place == "file":
            continue  # as weights, a file is a weight file
        message = {"gone": "there is no such file or folder: give a weight file, the folder of a run, a folder"}.get(
            place, "holds neither a run nor weights: give a weight file, the folder of" if place == "empty" else message
        )
        finetune = f"{Path(RECIPE).parent / 'finetune.py'}:weights={folder},data={tmp_path}"
        for words in (
            ["predict", str(image), "--weights", folder],
            ["train", finetune, "--workdir", str(tmp_path / "run")],
        ):
            said = fails(capsys, *words)
            assert f"weights = {folder!r}: " in said
            assert message in said
        unused = ["train", RECIPE, "--workdir", str(tmp_path / "run"), "--no-tensorboard"]
        said = fails(capsys, *unused, "--init-from", folder)
        assert f"init_from = {folder!r}: " in said
        assert message in said


def test_broken_recipes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    text = Path(RECIPE).read_text()

    def complaint(old: str, new: str) -> str:
        assert old in text
        recipe.write_text(text.replace(old, new))
        return fails(capsys, "train", str(recipe), "--workdir", str(tmp_path / "run"))

    assert "unknown model 'nfnet_f9'" in complaint(
        "def recipe() -> Recipe:", "from nfnet_flax.models import model_config\nmodel_config('nfnet_f9')\ndef recipe():"
    )
    typed = complaint("learning_rate_per_256=", "learnin_rate=")
    line = next(n for n, text in enumerate(recipe.read_text().splitlines(), 1) if "learnin_rate=" in text)
    assert f"mine.py', line {line}: TypeError: OptimConfig.__init__() got an unexpected keyword argument" in typed
    assert "did you mean learning_rate" in typed
    assert "Its fields are method, clipping, schedule, learning_rate_per_256," in typed
    moved = complaint("warmup_epochs=2.0", "momentum=0.9")
    assert "unexpected keyword argument 'momentum': it is part of method=SGD(...) now" in moved
    assert "optim.clipping = 0.05: give AGC(ratio=0.05)" in complaint("AGC(ratio=0.05)", "0.05")
    assert "DataConfig.batch_size = '64': expected int" in complaint("batch_size=64", "batch_size='64'")
    assert "no function recipe()" in complaint("def recipe()", "def recipes()")
    syntax = complaint("def recipe()", "def recipe(")
    line = next(n for n, text in enumerate(recipe.read_text().splitlines(), 1) if "def recipe(" in text)
    assert f"mine.py', line {line}: SyntaxError" in syntax
    (tmp_path / "beside.py").write_text("rate = 1 / 0\n")
    assert "beside.py', line 1: ZeroDivisionError" in complaint("def recipe()", "import beside\ndef recipe()")


def test_an_unwritable_or_foreign_workdir_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in fails(capsys, "train", RECIPE, "--workdir", str(tmp_path / "file" / "run"))
    if os.path.isdir("/proc/self"):  # a folder that even root cannot write
        assert "cannot be written" in fails(capsys, "train", RECIPE, "--workdir", "/proc/self/run")
    from nfnet_flax.recipe_file import load_recipe

    runs.claimed(tmp_path / "run", load_recipe(RECIPE))
    other = fails(
        capsys, "train", RECIPE, "--workdir", str(tmp_path / "run"), "--optim.clipping.ratio", "0.02", "--seed", "7"
    )
    assert "optim.clipping.ratio: 0.05 -> 0.02" in other
    assert "seed: 0 -> 7" in other


def test_a_batch_must_divide_over_the_devices(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nfnet_flax.cli",
            "train",
            RECIPE,
            "--workdir",
            str(tmp_path),
            "--data.batch-size",
            "30",
        ],
        env=runs.with_devices(8),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == exit_codes.EXIT_BAD_INPUT
    assert done.stderr == "nfnet: error: data.batch_size = 30: must be divisible by the 8 devices of this run\n"


def test_help_lists_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", RECIPE, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    options = ("--optim.clipping.ratio", "--optim.method.momentum", "--data.batch-size", "--model.widths")
    for option in (*options, "--checkpoint.keep-last", "--workdir"):
        assert option in printed


def test_divergence_stops_before_anything_is_saved(tmp_path: Path) -> None:
    options = ("--optim.learning-rate-per-256=1e30", "--optim.warmup-epochs=0", "--checkpoint.every-steps=1")
    process = runs.start(tmp_path / "run", *options)
    printed = runs.finish(process)
    assert process.returncode == exit_codes.EXIT_DIVERGED
    assert "Traceback" not in printed
    assert "nfnet: diverged: step " in printed
    assert "learning rate 6.25e+28" in printed
    assert "optim.clipping AGC(ratio=0.05, eps=0.001)" in printed
    bad_step = int(printed.split("nfnet: diverged: step ")[1].split(":")[0])
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert all(step < bad_step for step in saved)
    for step in saved:
        assert all(np_finite(array) for array in runs.saved_arrays(tmp_path / "run", step).values())


def np_finite(array: object) -> bool:
    import numpy as np

    return bool(np.all(np.isfinite(np.asarray(array))))


def test_models_lists_what_a_pattern_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "[en]f*net_?0"]) == exit_codes.EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["nfnet_f0", "nf_regnet_b0", "nfnet_l0", "efficientnet_b0"]
    assert lines[2].split() == ["nfnet_f0", "71,489,284", "6.98", "192", "256", "83.6%"]
    assert lines[5].split() == ["efficientnet_b0", "5,288,548", "0.39", "224", "224", "77.1%"]
    assert "unknown model 'nfnet_x*'" in fails(capsys, "models", "nfnet_x*")


def test_a_plan_says_what_it_takes() -> None:
    words = [sys.executable, "-m", "nfnet_flax.cli", "plan", RECIPE, "--topology", "v99:1x1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == exit_codes.EXIT_BAD_INPUT
    assert "topology 'v99:1x1'" in done.stderr
    assert "pip install 'nfnet_flax[tpu]'" in done.stderr
    assert "Traceback" not in done.stderr
