"""Metrics on disk after every way of stopping."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nfnet_flax.training.metrics import MetricsLog, read_rows


def steps_by_tag(workdir: Path) -> dict[str, list[int]]:
    accumulator = EventAccumulator(str(workdir / "tensorboard"))
    accumulator.Reload()
    return {tag: [event.step for event in accumulator.Tensors(tag)] for tag in accumulator.Tags()["tensors"]}


def test_an_evaluation_that_is_repeated_stands_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=True)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": 1.0 / step})
        log.write(step, {"eval/top1": 0.1 * step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # cut short by a kill

    # The checkpoint of step 2 was made by a stop during its evaluation.
    log = MetricsLog(tmp_path, resume_step=2, evaluated=False, tensorboard=True)
    log.write(2, {"eval/top1": 0.2})
    log.write(3, {"train/loss": 0.5})
    log.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "train/loss": 1.0, "eval/top1": 0.1},
        {"step": 2, "train/loss": 0.5, "eval/top1": 0.2},
        {"step": 3, "train/loss": 0.5},
    ]
    assert steps_by_tag(tmp_path) == {"train/loss": [1, 2, 3], "eval/top1": [1, 2]}

    log = MetricsLog(tmp_path, resume_step=2, evaluated=True, tensorboard=True)
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl")[-1] == {"step": 2, "train/loss": 0.5, "eval/top1": 0.2}
    assert steps_by_tag(tmp_path) == {"train/loss": [1, 2], "eval/top1": [1, 2]}


def test_a_kill_right_after_the_resume_loses_nothing(tmp_path: Path) -> None:
    def on_disk() -> list[dict[str, float]]:
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    log = MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": 1.0 / step})
    log.close()
    resumed = MetricsLog(tmp_path, resume_step=2, evaluated=False, tensorboard=False)
    assert on_disk() == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    # What comes late for the step completes its line.
    resumed.flush()
    resumed.write(2, {"eval/top1": 0.2})
    resumed.flush()
    assert on_disk() == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5, "eval/top1": 0.2}]
    resumed.close()
