"""The promise: a run that was stopped or killed ends with the same bits as one that was not."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from nfnet_flax.cli import main
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_STOPPED
from nfnet_flax.training.metrics import OF_THE_MACHINE
from tests import runs


def start(workdir: Path, *options: str) -> subprocess.Popen[str]:
    """A run as users have it: optimized, and with TensorBoard."""
    return runs.start(workdir, "--tensorboard", *options, environment=runs.OPTIMIZED)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(workdir)
    assert "finished: 60 steps" in runs.finish(process)
    assert process.returncode == EXIT_DONE
    return workdir


@pytest.fixture(scope="module", params=[signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def interrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / request.param.name
    process = start(workdir)
    saved = workdir / "checkpoints" / "20" if request.param is signal.SIGKILL else None
    printed = runs.signal_at(process, 31, request.param, saved)
    stopped: list[int] = []
    if request.param is signal.SIGTERM:
        assert process.returncode == EXIT_STOPPED
        assert "run the same command again" in printed
        stopped = [int(step) for step in re.findall(r"^stopping at step (\d+): SIGTERM", printed, re.MULTILINE)]
        assert len(stopped) == 1
        assert 31 <= stopped[0] < 60
    else:
        assert process.returncode == -signal.SIGKILL
    process = start(workdir)
    printed = runs.finish(process)
    assert process.returncode == EXIT_DONE, printed
    if request.param is signal.SIGKILL:
        assert any(f"continuing from step {step} " in printed for step in (20, 40)), printed
    else:
        # Nothing that was done is done again. How many steps passed before the signal came, the machine's load decides.
        assert f"continuing from step {stopped[0]} " in printed, printed
    return workdir


def rows(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(OF_THE_MACHINE)}
        for line in lines
    ]


def test_final_state_is_bitwise_equal(uninterrupted: Path, interrupted: Path) -> None:
    want, got = (runs.saved_arrays(workdir, runs.STEPS) for workdir in (uninterrupted, interrupted))
    assert any("ema_params" in name for name in want)
    assert any("trace" in name for name in want)
    assert want.keys() == got.keys()
    assert [name for name in want if want[name].tobytes() != got[name].tobytes()] == []


def test_metrics_of_every_step_are_equal_and_stand_once(uninterrupted: Path, interrupted: Path) -> None:
    want, got = rows(uninterrupted), rows(interrupted)
    assert [row["step"] for row in want] == list(range(1, runs.STEPS + 1))
    assert all(np.isfinite(row["train/loss"]) for row in want)
    assert want == got


def scalars(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"tensors": 0})
    accumulator.Reload()
    found = accumulator.Tags()["tensors"]
    tags = [tag for tag in found if accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"]
    return {
        tag: [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in accumulator.Tensors(tag)]
        for tag in tags
    }


def test_tensorboard_holds_every_step_once(uninterrupted: Path, interrupted: Path) -> None:
    for workdir in (uninterrupted, interrupted):
        found = scalars(workdir)
        for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "throughput/images_per_s"):
            assert sorted(step for step, _ in found[tag]) == list(range(1, runs.STEPS + 1)), tag
        for tag in ("eval/top1", "eval_ema/top1"):
            assert sorted(step for step, _ in found[tag]) == [20, 40, 60], tag
        by_step = {row["step"]: row for row in rows(workdir)}
        for step, value in found["train/loss"]:
            assert value == pytest.approx(by_step[step]["train/loss"], rel=1e-6)


def test_a_finished_run_says_so_and_keeps_what_it_has(uninterrupted: Path) -> None:
    before = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert before == ["20", "40", "60"]
    assert len(list((uninterrupted / "best").iterdir())) == 1
    text = (uninterrupted / "metrics.jsonl").read_bytes()
    process = start(uninterrupted)
    printed = runs.finish(process)
    assert process.returncode == EXIT_DONE
    assert "finished: 60 steps" in printed
    assert f"on {runs.NUM_HELD_OUT} examples" in printed
    assert (uninterrupted / "metrics.jsonl").read_bytes() == text
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == before


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    runs.damage(workdir / "checkpoints" / "60")
    skipped = f"checkpoint {workdir / 'checkpoints' / '60'} is damaged and skipped: "

    # Who only reads says so, and touches nothing.
    before = [(path, path.stat().st_mtime_ns) for path in [workdir, *sorted(workdir.rglob("*"))]]
    assert main(["eval", "--workdir", str(workdir)]) == EXIT_DONE
    printed = capsys.readouterr()
    assert "step 40\n" in printed.out
    assert printed.err.count(skipped) == 1
    assert [(path, path.stat().st_mtime_ns) for path in [workdir, *sorted(workdir.rglob("*"))]] == before

    process = start(workdir)
    printed_again = runs.finish(process)
    assert process.returncode == EXIT_DONE, printed_again
    assert printed_again.count(skipped) == 1
    assert "continuing from step 40 " in printed_again
    want, got = (runs.saved_arrays(folder, runs.STEPS) for folder in (uninterrupted, workdir))
    assert want.keys() == got.keys()
    assert all(want[name].tobytes() == got[name].tobytes() for name in want)
    assert rows(workdir) == rows(uninterrupted)


def test_a_stop_during_an_evaluation_is_not_lost(tmp_path: Path) -> None:
    # Of the length of the other runs, whose compiled step it finds in the cache: the schedule is part of the program.
    options = ("--eval-every-steps=50", "--data.eval-batch-size=8")
    process = start(tmp_path, *options)
    printed = runs.signal_at(process, 50, signal.SIGTERM)  # the evaluation of step 50 begins now
    assert process.returncode == EXIT_STOPPED
    assert "stopped at step 50 of 60" in printed
    assert "top-1" not in printed

    process = start(tmp_path, *options)
    printed = runs.signal_at(process, 60, signal.SIGTERM)  # and now the last one: the run is not finished without it
    assert process.returncode == EXIT_STOPPED
    assert "step 50: top-1" in printed
    assert "stopped at step 60 of 60" in printed
    assert "finished" not in printed

    process = start(tmp_path, *options)
    printed = runs.finish(process)
    assert process.returncode == EXIT_DONE
    assert "finished: 60 steps" in printed
    assert f"on {runs.NUM_HELD_OUT} examples" in printed
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 61))
    assert [row["step"] for row in found if "eval_ema/top1" in row] == [50, 60]
    assert sorted(step for step, _ in scalars(tmp_path)["eval/top1"]) == [50, 60]
