"""Which run a folder is: what has to be the same at a resume, what may change and is said, what labels mean."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.doctor.data import check_data
from nfnet_flax.doctor.workdir import check_workdir
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from nfnet_flax.recipe import CheckpointConfig, read_recipe
from nfnet_flax.training import checkpoint, layout
from nfnet_flax.training.metrics import NoMetrics
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.saving import saving
from tests import runs
from tests.image_sets import CLASSES, make_folder
from tests.test_checkpoint import make_state
from tests.test_doctor import problems
from tests.test_input_runs import recipe_on
from tests.test_processes import TINY

OPTIONS = (*TINY, "--num-steps=4", "--eval-every-steps=4", "--checkpoint.every-steps=2", "--num-classes=3")


def train(workdir: Path, recipe: Path, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and all that a start prints."""
    process = runs.start(workdir, *OPTIONS, *options, recipe=recipe, environment=environment)
    return process.wait(300), runs.finish(process)


def evaluated(workdir: Path, *options: str) -> tuple[int, str]:
    """Exit code of `nfnet eval`, and what it prints."""
    command = [*runs.command(workdir)[:3], "eval", "--workdir", str(workdir), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a recipe on them, and a run that ended."""
    folder = tmp_path_factory.mktemp("first")
    make_folder(folder / "images", num_train=8)
    recipe = Path(recipe_on(folder))
    recipe.write_text(recipe.read_text().replace("'nowhere'", repr(str(folder / "images"))))
    code, printed = train(folder / "run", recipe)
    assert code == EXIT_DONE, printed
    return folder


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    """A copy of that run, without its last checkpoint."""
    workdir = Path(shutil.copytree(first / "run", tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    return workdir


def test_what_decides_no_update_may_change_and_is_said(first: Path, run: Path) -> None:
    moved = shutil.copytree(first / "images", run.parent / "moved")
    code, printed = train(
        run,
        first / "mine.py",
        "--checkpoint.keep-last=1",
        "--log-every-steps=2",
        "--name=mine",
        f"--data.source.root={moved}",
        environment={"NPROC": "9"},
    )
    assert code == EXIT_DONE, printed
    assert "continuing from step 2" in printed
    (said,) = [line for line in printed.splitlines() if line.startswith("nfnet: changed since the last start")]
    for change in ("checkpoint.keep_last: 3 -> 1", "log_every_steps: 1 -> 2", "name: 'digits' -> 'mine'", str(moved)):
        assert change in said
    (environment,) = [
        line for line in printed.splitlines() if line.startswith("nfnet: another environment than before")
    ]
    assert "thread_pool_size: '8' -> '9'" in environment
    assert "from step 2 on the last bits will differ" in environment
    kept = run / "environment-until-step-2.json"
    assert json.loads(kept.read_text())["thread_pool_size"] == "8"
    assert json.loads((run / layout.RECIPE).read_text())["data"]["source"]["root"] == str(moved)
    assert layout.steps_in(run / "checkpoints") == [4]
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.copytree(first / "run" / "checkpoints" / "2", run / "checkpoints" / "2", dirs_exist_ok=True)
    recipe = read_recipe(run / layout.RECIPE)
    runs.claimed(run, recipe, logs=False)  # a third environment, before the second one has saved anything
    assert json.loads(kept.read_text())["thread_pool_size"] == "8"


def test_a_run_may_be_lengthened_and_not_cut_off_behind_its_last_step(first: Path, run: Path) -> None:
    code, printed = train(run, first / "mine.py", "--num-steps=1")
    assert code == EXIT_BAD_INPUT
    assert "num_steps = 1: the run would end at step 1, and is at step 2 already" in printed
    code, printed = train(run, first / "mine.py", "--num-steps=5")
    assert code == EXIT_DONE, printed
    assert "the run now has 5 steps instead of 4: from step 2 on the learning rate follows the schedule" in printed
    assert "changed since the last start" not in printed
    assert json.loads((run / layout.RECIPE).read_text())["num_steps"] == 5
    code, printed = train(run, first / "mine.py", "--num-steps=5")  # as it is by now: nothing to say
    assert code == EXIT_DONE, printed
    assert "the run now has" not in printed


def test_what_decides_an_update_may_not(first: Path, run: Path) -> None:
    code, printed = train(run, first / "mine.py", "--seed=7")
    assert code == EXIT_BAD_INPUT
    assert "seed: 0 -> 7" in printed
    assert "Traceback" not in printed


def test_a_renamed_class_is_named_and_never_taken_for_its_neighbour(first: Path, run: Path) -> None:
    images = shutil.copytree(first / "images", run.parent / "images")
    for split in ("train", "val"):
        (images / split / CLASSES[0]).rename(images / split / "z_last")
    stored = run / layout.RECIPE
    stored.write_text(stored.read_text().replace(str(first / "images"), str(images)))
    for code, printed in (evaluated(run), train(run, first / "mine.py", f"--data.source.root={images}")):
        assert code == EXIT_BAD_INPUT, printed
        assert "class 'z_last' is unknown" in printed
    for split in ("train", "val"):
        (images / split / "z_last").rename(images / split / CLASSES[0])
    shutil.rmtree(images / "val" / CLASSES[0])  # a class that the held-out set lacks moves no label
    code, printed = evaluated(run)
    assert code == EXIT_DONE, printed
    assert "on 4 examples" in printed


def test_a_checkpoint_is_chosen_and_evaluated_on_images_that_lie_elsewhere(first: Path, run: Path) -> None:
    moved = shutil.copytree(first / "images", run.parent / "moved")
    code, printed = evaluated(run, "--checkpoint", "best", f"--data.source.root={moved}")
    assert code == EXIT_DONE, printed
    assert printed.startswith("step 4\n")  # only the best is left of it
    code, printed = evaluated(run, "--checkpoint", "3")
    assert code == EXIT_BAD_INPUT
    assert "Traceback" not in printed


def test_images_may_be_repaired_which_is_said(first: Path, run: Path) -> None:
    images = shutil.copytree(first / "images", run.parent / "images")
    for split in ("train", "val"):
        with next((images / split / CLASSES[0]).iterdir()).open("ab") as file:
            file.write(b"\0")  # behind the image
    code, printed = train(run, first / "mine.py", f"--data.source.root={images}")
    assert code == EXIT_DONE, printed
    (said,) = [
        line
        for line in printed.splitlines()
        if line.startswith("nfnet: held-out images or contents of training images changed")
    ]
    assert "eval_source.contents: " in said
    assert " source.contents: " in said
    code, printed = train(run, first / "mine.py", f"--data.source.root={images}")
    assert "contents of training images changed" not in printed  # they are on record now
    next((images / "train" / CLASSES[0]).iterdir()).unlink()
    code, printed = train(run, first / "mine.py", f"--data.source.root={images}")
    assert code == EXIT_BAD_INPUT
    assert "was trained on another input" in printed


def test_the_class_list_is_needed_and_checked(run: Path) -> None:
    (run / layout.CLASSES).write_text("")
    code, printed = evaluated(run)
    assert code == EXIT_BAD_INPUT
    assert str(run / layout.CLASSES) in printed
    assert "Traceback" not in printed


def test_a_start_that_trained_nothing_ties_the_folder_to_no_recipe(first: Path, tmp_path: Path) -> None:
    images = shutil.copytree(first / "images", tmp_path / "images")
    stored = read_recipe(first / "run" / layout.RECIPE)
    recipe = dataclasses.replace(
        stored, num_classes=4, data=dataclasses.replace(stored.data, source=FolderSource(root=str(images)))
    )
    workdir = tmp_path / "run"
    assert runs.claimed(workdir, recipe, logs=False) == []
    assert runs.claimed(workdir, recipe, logs=False) == []
    for split in ("train", "val"):
        (images / split / CLASSES[0]).rename(images / split / "z_last")
    right = dataclasses.replace(recipe, num_classes=3)
    data = problems(check_data(right, workdir))
    assert data == problems(check_workdir(RunFolder(workdir), right, until_s=0)) == []
    (said,) = runs.claimed(workdir, right)
    assert said.startswith(
        "another run than at the last start, which trained nothing here: num_classes: 4 -> 3; source."
    )
    assert f"class names: {', '.join(CLASSES)} -> {', '.join((*CLASSES[1:], 'z_last'))}" in said
    assert read_recipe(workdir / layout.RECIPE) == right
    assert runs.claimed(workdir, right) == []
    with pytest.raises(ConfigError, match="num_classes: 3 -> 4"):  # by now there are metrics of a step
        runs.claimed(workdir, recipe)


def best_step(workdir: Path) -> int | None:
    return next(iter(layout.steps_in(workdir / "best")), None)


def evaluate_at(
    workdir: Path, resume_step: int, *scores: tuple[int, float], config: CheckpointConfig | None = None
) -> None:
    """A life of a run that goes on from a step and is evaluated at others."""
    with saving(RunFolder(workdir), config or CheckpointConfig(), None, log_every_steps=1) as saver:
        saver.resume_at(resume_step)
        for step, score in scores:
            saver.save_if_best(make_state(step), step, {"eval_ema/top1": score}, NoMetrics())


def test_the_best_of_steps_that_are_done_again_does_not_outlive_them(tmp_path: Path) -> None:
    evaluate_at(tmp_path, 0, (10, 0.5), (20, 0.9), (30, 0.6))
    assert best_step(tmp_path) == 20
    evaluate_at(tmp_path, 10, (20, 0.9))  # the same again: it stays
    assert best_step(tmp_path) == 20
    evaluate_at(tmp_path, 10, (20, 0.7), (30, 0.6))  # another environment came to another result
    with checkpoint.open_manager(tmp_path, "best", keep=1) as manager:
        assert checkpoint.read_newest_notes(manager) == (20, {"evaluated": True, "metrics": {"eval_ema/top1": 0.7}})
    evaluate_at(tmp_path, 30, (40, 0.65), (50, 0.8))
    assert best_step(tmp_path) == 50


def test_the_best_may_be_the_lowest(tmp_path: Path) -> None:
    evaluate_at(tmp_path, 0, (10, 0.5), (20, 0.3), (30, 0.4), config=CheckpointConfig(best_is="lowest"))
    assert best_step(tmp_path) == 20


def test_what_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    evaluate_at(tmp_path, 0, (10, float("nan")))
    assert best_step(tmp_path) is None
    evaluate_at(tmp_path, 10, (20, 0.1), (30, float("nan")))
    assert best_step(tmp_path) == 20
