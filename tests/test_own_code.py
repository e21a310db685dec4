"""Networks, sources and objectives of a user's own: the commands work with them, their code is on record, and nothing
that a run's folder names is run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.metrics import OF_THE_MACHINE
from tests import own_files, runs

STEPS = 200


def nfnet(*words: str | Path | int) -> subprocess.Popen[str]:
    """Starts a command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "nfnet_flax.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def ran(*words: str | Path) -> tuple[int, str]:
    """Exit code of a command, and all that it prints."""
    process = nfnet(*words)
    printed = runs.finish(process)
    return process.returncode, " ".join(printed.replace("│", " ").split())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's files, and a whole run in `run`; not to be changed."""
    folder = tmp_path_factory.mktemp("own")
    code, printed = ran("train", own_files.write(folder), "--workdir", folder / "run")
    assert code == EXIT_DONE, printed
    assert f"finished: {STEPS} steps" in printed
    assert "step 200: loss 0." in printed
    assert "parameters loss surest on 60 examples" in printed
    return folder


@pytest.fixture
def copied(own: Path, tmp_path: Path) -> Path:
    """A copy of all of it."""
    return Path(shutil.copytree(own, tmp_path / "own"))


def rows(workdir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE)} for line in lines]


def test_a_killed_run_ends_with_the_same_bits(own: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "killed"
    process = nfnet("train", own / "my_recipe.py", "--workdir", workdir)
    runs.signal_at(process, 30, signal.SIGKILL, workdir / "checkpoints" / "20")
    assert process.returncode == -signal.SIGKILL
    code, printed = ran("train", own / "my_recipe.py", "--workdir", workdir)
    assert code == EXIT_DONE, printed
    assert "continuing from step" in printed
    want, got = (runs.saved_arrays(path, STEPS) for path in (own / "run", workdir))
    assert [name for name in want if want[name].tobytes() != got[name].tobytes()] == []
    assert rows(own / "run") == rows(workdir)
    assert rows(workdir)[-1]["eval/loss"] < 0.3  # it learns
    assert "train/surest" in rows(workdir)[-1]


def test_what_is_on_record(own: Path) -> None:
    stored = json.loads((own / "run" / "recipe.json").read_text())
    parts = (stored["model"], stored["data"]["source"], stored["objective"], stored["optim"]["method"])
    names = ["my_net:MyNetConfig", "my_recipe:Shades", "my_recipe:Brier", "my_recipe:Momentum"]
    assert [part["type"] for part in parts] == names
    assert stored["checkpoint"]["best_is"] == "lowest"
    kept = own / "run" / "code"
    assert sorted(path.name for path in kept.iterdir()) == sorted(own_files.FILES)
    assert all((kept / name).read_bytes() == (own / name).read_bytes() for name in own_files.FILES)
    best = [int(path.name) for path in (own / "run" / "best").iterdir()]
    losses = {row["step"]: row["eval_ema/loss"] for row in rows(own / "run") if "eval_ema/loss" in row}
    assert best == [min(losses, key=losses.__getitem__)]


def test_a_change_of_what_the_code_does_is_refused(copied: Path) -> None:
    recipe, workdir = copied / "my_recipe.py", copied / "run"
    own_files.replace(copied / "my_net.py", "    def build(", "    # Mine.\n    def build(")
    own_files.replace(copied / "my_net.py", "Channels of all layers.", "Channels.")
    own_files.replace(copied / "my_net.py", "x + 0.2 * branch, branch  # no skip gain", "(x + 0.2 * branch), branch")
    own_files.replace(recipe, "def recipe(width: int = 8):", "def recipe(width: int = 4 + 4):")
    code, printed = ran("train", recipe, "--workdir", workdir)
    assert code == EXIT_DONE, printed
    assert "changed" not in printed
    own_files.replace(copied / "my_layers.py", "width // 2", "width // 4")
    code, printed = ran("train", recipe, "--workdir", workdir)
    assert code == EXIT_BAD_INPUT
    changed = "my_layers.py: - return max(2, width // 2) + return max(2, width // 4)"
    assert f"the code of the run in '{workdir}' changed since it began: {changed} use the code as it was" in printed
    copy = workdir / "code" / "my_recipe.py"
    assert f"nfnet train {copy} --workdir {workdir} continues with the copies of the run" in printed
    code, printed = ran("train", copy, "--workdir", workdir, "--num-steps", "201")
    assert code == EXIT_DONE, printed
    code, printed = ran("doctor", "--workdir", workdir, "--code", recipe, "--timeout-s", "300")
    assert f"WRONG: the run began with other code ( {changed}): restore it" in printed
    code, printed = ran("eval", "--workdir", workdir, "--code", recipe)
    assert code == EXIT_DONE, printed
    assert f"changed since it began; the present code is used (copies of the old code are in {copy.parent})" in printed


def test_commands_run_nothing_but_what_is_named(own: Path, tmp_path: Path) -> None:
    workdir = own / "run"
    refused = "of a user's own code, which is not loaded. Code is run only if you name it: give the file that defines"
    code, printed = ran("eval", "--workdir", workdir)
    assert code == EXIT_BAD_INPUT
    assert f"recipe.json: model names the class my_net:MyNetConfig {refused} the class (--code my_net.py)" in printed
    assert f"or import it first; copies are in {workdir / 'code'}" in printed
    code, printed = ran(
        "eval", "--workdir", workdir, "--code", own / "my_recipe.py", "--data.source.num-examples", "30"
    )
    assert code == EXIT_DONE, printed
    assert "on 30 examples" in printed
    assert "changed" not in printed
    code, printed = ran("doctor", "--workdir", workdir, "--timeout-s", "300")
    assert "WRONG" not in printed
    assert refused in printed
    code, printed = ran("doctor", "--workdir", workdir, "--code", own / "my_recipe.py", "--timeout-s", "300")
    assert code == EXIT_DONE, printed
    assert "code: my_layers.py, my_net.py, my_recipe.py as on record" in printed


LOADS = """
import sys
import nfnet_flax
from nfnet_flax.config_json import CodeNotLoaded

weights, folder = sys.argv[1:]
try:
    nfnet_flax.load_model(weights)
except CodeNotLoaded as error:
    print(error)
sys.path.insert(0, folder)
import my_net
model = nfnet_flax.load_model(weights)
print(type(model) is my_net.MyNet, model.config)
nfnet_flax.load_code(f"{folder}/my_recipe.py")
run = nfnet_flax.Run(f"{folder}/run")
print(run.model().config == model.config, type(run.recipe.objective).__name__)
"""


def test_weights_of_a_network_of_ones_own(own: Path, tmp_path: Path) -> None:
    code, printed = ran("convert", "run", own / "run", "--out", tmp_path, "--code", own / "my_recipe.py")
    assert code == EXIT_DONE, printed
    command = [sys.executable, "-c", LOADS, str(tmp_path / "weights.safetensors"), str(own)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, loaded, of_run = done.stdout.splitlines()
    assert "weights.safetensors': model names the class my_net:MyNetConfig" in refused
    assert loaded.startswith("True MyNetConfig(")
    assert of_run == "True Brier"


def test_worker_processes_run_the_same_files(own: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my_net.py").write_text("raise RuntimeError('another file of that name')\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "elsewhere"), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(
        [
            *[
                sys.executable,
                "-m",
                "nfnet_flax.cli",
                "train",
                str(own / "my_recipe.py"),
                "--workdir",
                str(tmp_path / "run"),
            ],
            *["--num-steps", "2", "--data.num-workers", "1", "--data.num-threads", "1"],
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == EXIT_DONE, process.stderr
    loss = "train/loss"
    assert [row[loss] for row in rows(tmp_path / "run")] != []
    assert rows(tmp_path / "run")[0][loss] == rows(own / "run")[0][loss]


def test_debug_takes_the_small_network(own: Path, tmp_path: Path) -> None:
    options = ("--debug", "--workdir", tmp_path / "run", "--objective.weight", "2", "--model.compute-dtype", "bfloat16")
    code, printed = ran("train", own / "my_recipe.py", *options)
    assert code == EXIT_DONE, printed
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (stored["model"]["width"], stored["model"]["compute_dtype"]) == (4, "bfloat16")
    assert (stored["objective"]["weight"], stored["data"]["source"]["type"]) == (2, "SyntheticSource")


def test_a_start_that_trained_nothing_leaves_its_code_free(tmp_path: Path) -> None:
    recipe, workdir = load_recipe(own_files.write(tmp_path / "own")), tmp_path / "run"
    layers = tmp_path / "own" / "my_layers.py"
    assert runs.claimed(workdir, recipe, logs=False) == []
    own_files.replace(layers, "width // 2", "width // 4")
    (said,) = runs.claimed(workdir, recipe)
    assert said == "another run than at the last start, which trained nothing here: code of my_layers.py"
    assert (workdir / "code" / "my_layers.py").read_bytes() == layers.read_bytes()
    own_files.replace(layers, "width // 4", "width // 8")
    with pytest.raises(ConfigError, match=r"changed since it began:\n  my_layers\.py:\n    -.*width // 4\)\n"):
        runs.claimed(workdir, recipe)
    own_files.replace(layers, "width // 8", "width // 4")
    shutil.rmtree(workdir / "code")  # as of a run from before there was any
    (said,) = runs.claimed(workdir, recipe)
    assert said == "the run's own code was not recorded; from now on it is: my_layers.py, my_net.py, my_recipe.py"


def test_processes_with_other_code_do_not_start(own: Path, tmp_path: Path) -> None:
    folders = [own, Path(shutil.copytree(own, tmp_path / "other"))]
    own_files.replace(folders[1] / "my_layers.py", "width // 2", "width // 4")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = ["--distributed.coordinator-address", address, "--distributed.num-processes", "2"]
    processes = [
        nfnet(
            "train", folder / "my_recipe.py", "--workdir", tmp_path / "run", *joined, "--distributed.process-id", index
        )
        for index, folder in enumerate(folders)
    ]
    for process in processes:
        printed = runs.finish(process)
        assert process.returncode == EXIT_BAD_INPUT, printed
        assert "code my_layers.py: " in printed
        assert "code my_net.py" not in printed
