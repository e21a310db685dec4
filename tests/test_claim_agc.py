"""`nfnet claim agc`: what is compared, that a killed study goes on with the same numbers, and what is printed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax import cli
from nfnet_flax.claims import agc
from nfnet_flax.claims.agc_shown import agc_text, spread, tables
from nfnet_flax.claims.cell import read_result
from nfnet_flax.claims.evidence import read_evidence
from nfnet_flax.claims.study import run_study
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from nfnet_flax.models import NFResNetConfig, ResNetConfig
from nfnet_flax.optim import AGC, GlobalNorm
from nfnet_flax.training.setup import assemble

SHORT = ("--batch-sizes", "720", "--ratios", "0.16", "--max-norms", "1", "--exempt-batch-size", "720")
STUDY = agc.Study(
    batch_sizes=(720,),
    ratios=(0.16,),
    max_norms=(1.0,),
    exempt_batch_size=720,
    num_epochs=2.0,
    warmup_epochs=1.0,
    seeds=1,
)
"""The study of `SHORT` and `LENGTH`."""
LENGTH = ("--num-epochs", "2", "--warmup-epochs", "1", "--seeds", "1")


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nfnet_flax.cli", "claim", "agc", "--out", str(out), *SHORT, *LENGTH, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def cells_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "evidence.json").read_text())["data"]["cells"]
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a study that was killed in its first run and started again, and what the second start printed."""
    out = tmp_path_factory.mktemp("claims") / "agc"
    first = start(out, "--jobs", "1")
    end = time.monotonic() + 120
    while not list(out.glob("runs/*/*/*/run/metrics.jsonl")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not (out / "evidence.json").exists()
    second = start(out)
    printed = second.communicate(timeout=300)[0]
    assert second.returncode == EXIT_DONE, printed
    return out, printed


def test_a_killed_study_goes_on_and_repeats_nothing(measured: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = measured
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*/result.json")}
    assert len(before) == len(cells_of(out)) == 5 + 3  # of the four exemptions one is compared anyway
    again = start(out)
    printed = again.communicate(timeout=60)[0]
    assert again.returncode == EXIT_DONE, printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    recipes = agc.recipes(STUDY)
    assert {f"{name}/result.json" for name in recipes} == {f"{path.relative_to(out / 'runs')}" for path in before}
    # The run that was killed, which is the first one, and another one, undisturbed:
    undisturbed = {name: recipes[name] for name in list(recipes)[:2]}
    variables = {name: {"JAX_PLATFORMS": "cpu"} for name in undisturbed}
    for name, result in run_study(undisturbed, tmp_path, num_jobs=2, variables=variables).items():
        found = read_result(out / "runs" / name)
        assert found is not None
        assert dataclasses.replace(found, date=result.date) == result


def test_another_seed_gives_other_numbers_and_another_folder_is_asked_for(
    measured: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = measured
    seeds = {cell["seed"] for cell in cells_of(out)}
    assert seeds == {0}
    options = ["--out", str(out), *SHORT, *LENGTH, "--num-epochs", "3"]
    assert cli.main(["claim", "agc", *options]) == EXIT_BAD_INPUT
    assert (
        "has another run (num_epochs: 2.0 -> 3.0): give another --out, or remove this folder ("
        in capsys.readouterr().err
    )


def test_the_text_is_made_of_the_evidence(measured: tuple[Path, str]) -> None:
    out, printed = measured
    found = read_evidence(out / "evidence.json", "agc")
    assert agc_text(found) in printed
    assert "nfnet claim agc --out" in printed
    assert (out / "agc.svg").read_text().startswith("<?xml")
    row = next(cell for cell in found.data["cells"] if cell["kind"] == "BatchNorm")
    row |= {"outcome": "diverged", "top1": None, "loss": None}
    assert "| BatchNorm, no clipping | diverged (1 of 1) |" in tables(found)["settings"]


def test_spread_counts_what_diverged() -> None:
    def cell(top1: float | None) -> dict[str, Any]:
        return {"outcome": "diverged" if top1 is None else "finished", "top1": top1}

    assert spread([cell(0.9), cell(0.7)]).text() == "80.0 ± 14.1"
    assert spread([cell(0.9), cell(None)]).text() == "45.0 ± 63.6, 1 of 2 diverged"
    assert spread([cell(None)]).text() == "diverged (1 of 1)"


def test_what_is_compared() -> None:
    study = agc.Study()
    found = agc.cells(study)
    assert len(found) == 3 * 3 * (2 + 2 * 4 + 5) + 3 * 3
    kinds = [type(method.clipping) for method, _, _ in found.values()]
    assert (kinds.count(type(None)), kinds.count(GlobalNorm)) == (18, 45)
    networks = {type(method.model) for method, _, _ in found.values()}
    assert networks == {ResNetConfig, NFResNetConfig}
    name, (method, size, seed) = next(item for item in found.items() if item[1][0].exempt == agc.SKIP_GAINS)
    assert name == "batch-64/AGC-0.01-the-last-dense-layer-and-skip-gains/seed-0"
    assert isinstance(method.clipping, AGC)
    names = assemble(agc.recipe(study, method, size, seed), None).structure.shapes
    spared = set(names) - method.clipping.clipped(list(names))
    assert "head.kernel" in spared
    assert any(name.endswith("skip_gain") for name in spared)
    assert agc.recipe(study, method, 1024, 0).optim.peak_learning_rate(1024) == 4 * study.learning_rate_per_256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_sizes": ()}, r"batch_sizes = \(\): give different positive numbers"),
        ({"ratios": (0.1, 0.1)}, r"ratios = \(0.1, 0.1\): give different positive numbers"),
        ({"max_norms": (0.0,)}, r"max_norms = \(0.0,\): give different positive numbers"),
        ({"seeds": 0}, "seeds = 0: must be"),
        ({"first_seed": -1}, "first_seed = -1: must not be negative"),
        ({"warmup_epochs": 41.0}, "warmup_epochs = 41.0: must not be longer than the run: give at most num_epochs, 40"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(agc.Study(), **values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-sizes 64 5000", "batch_sizes = (64, 5000): must be at most 1,437, the number of training images"),
        ("--exempt-batch-size 1438", "exempt_batch_size = 1438: must be at most 1,437"),
        ("--jobs 0", "jobs = 0: must be at least 1"),
        ("--num-epochs 0 --warmup-epochs 0", "num_epochs = 0.0: "),
    ],
)
def test_refused_commands_leave_nothing_behind(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["claim", "agc", "--out", str(tmp_path / "out"), *options.split()]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_claim_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claim", "latencies"]) == EXIT_BAD_INPUT
    assert "unknown claim 'latencies'" in capsys.readouterr().err
    assert cli.main(["claim"]) == EXIT_BAD_INPUT
    assert "agc " in capsys.readouterr().err
