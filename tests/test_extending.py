"""The seven examples of `docs/extending.md`, all in one run that is killed and goes on to the same bits."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests import documents, runs

ALL = """
import dataclasses

import adabelief
import bfloat16_sum
import confidence
import npz_source
import poly1
import to_csv
from nfnet_flax import CheckpointConfig
from nfnet_flax.objectives import Metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sure(poly1.Poly1):
    def train(self, logits, batch, arrays):
        loss, metrics = super().train(logits, batch, arrays)
        return loss, {**metrics, "confidence": Metric(confidence.confidence(logits))}


def recipe():
    return dataclasses.replace(
        npz_source.recipe(),
        optim=adabelief.recipe().optim,
        objective=Sure(),
        execution=bfloat16_sum.recipe().execution,
        reduction=bfloat16_sum.recipe().reduction,
        telemetry=to_csv.recipe().telemetry,
        checkpoint=CheckpointConfig(every_steps=10),
        num_steps=40,
        eval_every_steps=20,
        log_every_steps=1,
        tensorboard=False,
    )
"""


def start(folder: Path, workdir: Path) -> subprocess.Popen[str]:
    command = ["-m", "nfnet_flax.cli", "train", str(folder / "all_seven.py"), "--workdir", str(workdir)]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_killed_run_of_all_seven_ends_with_the_same_bits(tmp_path: Path) -> None:
    names = []
    for block in documents.blocks("docs/extending.md"):
        first = block.text.splitlines()[0]
        if first.startswith("# recipes/"):
            names.append(Path(first.removeprefix("# ")).name)
            (tmp_path / names[-1]).write_text(block.text)
    assert len(names) == 7
    (tmp_path / "digits.py").write_text(runs.DIGITS.read_text())
    (tmp_path / "all_seven.py").write_text(ALL.lstrip())
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 64).astype(np.int32)
    images = (80 * labels[:, None, None, None] + rng.integers(0, 90, (64, 32, 32, 3))).astype(np.uint8)
    np.savez(
        tmp_path / "shades.npz",
        train_images=images[:40],
        train_labels=labels[:40],
        eval_images=images[40:],
        eval_labels=labels[40:],
    )

    whole = start(tmp_path, tmp_path / "whole")
    printed = runs.finish(whole)
    assert whole.returncode == 0, printed
    killed = start(tmp_path, tmp_path / "killed")
    runs.signal_at(killed, 15, signal.SIGKILL, tmp_path / "killed" / "checkpoints" / "10")
    assert killed.returncode == -signal.SIGKILL
    again = start(tmp_path, tmp_path / "killed")
    printed = runs.finish(again)
    assert again.returncode == 0, printed
    assert "continuing from step " in printed
    lines = (tmp_path / "accuracies.csv").read_text().splitlines()
    assert sum(line.endswith(",40,outcome,finished") for line in lines) == 2
    stored = json.loads((tmp_path / "killed" / "recipe.json").read_text())
    assert stored["telemetry"]["trackers"] == [{"type": "to_csv:ToCsv", "path": str(tmp_path / "accuracies.csv")}]
    want, got = (runs.saved_arrays(tmp_path / run, 40) for run in ("whole", "killed"))
    assert want.keys() == got.keys()
    assert all(want[name].tobytes() == got[name].tobytes() for name in want)
    assert sorted(path.name for path in (tmp_path / "whole" / "code").iterdir()) == sorted(
        [*names, "all_seven.py", "digits.py"]
    )
