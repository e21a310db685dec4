"""What TensorBoard shows of a run besides its metrics."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from nfnet_flax.training.metrics import MetricsLog


def summaries(folder: Path) -> dict[tuple[int, str], list[np.ndarray]]:
    """(Step, tag) -> its values in the event files of a folder, in which there should be one."""
    found: dict[tuple[int, str], list[np.ndarray]] = {}
    for path in sorted(folder.glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault((event.step, value.tag), []).append(tf.make_ndarray(value.tensor))
    return found


def write_steps(workdir: Path, steps: range, *, evaluated: bool = True) -> None:
    log = MetricsLog(workdir, resume_step=steps.start - 1, evaluated=evaluated, tensorboard=True)
    for step in steps:
        log.write(step, {"train/loss": 1.0})
        values = np.array([step, 2 * step, np.nan, np.inf])
        log.write_histograms(step, {"agc/a": values, "agc/b": 3 * values, "agc/c": np.full(2, np.nan)})
        log.write_images(step, {"eval/wrong": np.full((2, 3, 3), step, np.uint8)})
        log.write_texts(step, {"run/recipe": f"step {step}"})
    log.close()


@pytest.mark.parametrize("evaluated", [False, True])
def test_images_texts_and_histograms_stand_once_after_a_resume(evaluated: bool, tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(4, 7), evaluated=evaluated)
    found = summaries(tmp_path / "tensorboard")
    assert {key: len(values) for key, values in found.items() if len(values) > 1} == {}
    tags = ("train/loss", "agc/a", "agc/b", "run/recipe")
    pictured = (1, 2, 3, 4, 5, 6) if evaluated else (1, 2, 4, 5, 6)
    assert found.keys() == {(step, tag) for step in range(1, 7) for tag in tags} | {
        (step, "eval/wrong") for step in pictured
    }
    for step in range(1, 7):
        left, right, counts = found[step, "agc/b"][0].T
        assert (left[0], right[-1], counts.sum()) == (3 * step, 6 * step, 2)
        assert found[step, "run/recipe"][0].item() == f"step {step}".encode()
    for step in pictured:
        width, height, png = found[step, "eval/wrong"][0].tolist()
        assert (width, height) == (b"3", b"2")
        assert np.array_equal(tf.io.decode_png(png).numpy(), np.full((2, 3, 3), step, np.uint8))
