"""Metrics on disk after every way of stopping, and after what else happens to files."""

import contextlib
import json
import math
import os
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from nfnet_flax.config import ConfigError
from nfnet_flax.training.metrics import MetricsLog, read_metrics, read_rows
from nfnet_flax.training.storage import StorageFailed


def steps_by_tag(workdir: Path) -> dict[str, list[int]]:
    accumulator = EventAccumulator(str(workdir / "tensorboard"))
    accumulator.Reload()
    return {tag: [event.step for event in accumulator.Tensors(tag)] for tag in accumulator.Tags()["tensors"]}


def strict_rows(workdir: Path) -> list[dict[str, float | None]]:
    """The rows, read by a parser that knows no more than JSON."""

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def write_run(workdir: Path, steps: range, *, tensorboard: bool = False) -> None:
    """The metrics of a run that stopped after a checkpoint of the last step."""
    workdir.mkdir(exist_ok=True)
    log = MetricsLog(workdir, resume_step=steps.start - 1, evaluated=True, tensorboard=tensorboard)
    for step in steps:
        log.write(step, {"train/loss": 1.0 / step, "time/data_wait_s": 0.5})
    log.close()


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


def test_event_files_that_cannot_be_made_cost_no_metrics(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=True)
    (tmp_path / "tensorboard" / "train").rmdir()
    (tmp_path / "tensorboard" / "train").write_text("a file")  # in the way, since the log was made
    with pytest.raises(ConfigError, match="train is not a folder"):
        log.write(1, {"train/loss": 1.0})
    with pytest.raises(ConfigError, match="train is not a folder"):
        log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]


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


DAMAGE = {
    "no UTF-8": b"\xff\xfe\n",
    "a block that was never written": b"\0" * 4096 + b"\n",
    "the same in front of a row": b"\0" * 100,
    "cut by a crash of the machine": b'{"step": 2, "train/lo\n',
    "a list": b"[2]\n",
    "a word": b'"step"\n',
    "no step": b'{"train/loss": 1.0}\n',
    "a step that is no whole number": b'{"step": true, "train/loss": 1.0}\n',
    "no number": b'{"step": 2, "train/loss": [1e999]}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_good_rows_stay_before_and_after_the_damage(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first, *rest = whole.splitlines(keepends=True)
    damaged = b"".join([first, DAMAGE[kind], *rest])
    path.write_bytes(damaged)
    assert read_metrics(path).damaged_lines == [2]
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]

    MetricsLog(tmp_path, resume_step=4, evaluated=True, tensorboard=False).close()
    assert path.read_bytes() == whole
    kept = tmp_path / "damaged" / "metrics.jsonl"
    assert kept.read_bytes() == damaged
    assert capsys.readouterr().err == (
        f"nfnet: {path} is damaged: line 2 cannot be read; "
        f"the good rows stay, and the file as it was is kept as {kept}\n"
    )
    # There is nothing left to say, and what was kept stays.
    MetricsLog(tmp_path, resume_step=3, evaluated=True, tensorboard=False).close()
    assert capsys.readouterr().err == ""
    assert [row["step"] for row in strict_rows(tmp_path)] == [1, 2, 3]
    path.write_bytes(b"\0\n")
    MetricsLog(tmp_path, resume_step=3, evaluated=True, tensorboard=False).close()
    assert kept.read_bytes() == damaged
    assert (tmp_path / "damaged" / "metrics.jsonl-1").read_bytes() == b"\0\n"


def test_rows_that_stand_twice_or_out_of_order_stand_once(tmp_path: Path) -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": 3.0}, {"step": 2, "a": 2.0, "eval/b": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    MetricsLog(tmp_path, resume_step=2, evaluated=True, tensorboard=False).close()
    assert strict_rows(tmp_path) == [{"step": 1, "a": 3.0}, {"step": 2, "a": 2.0, "eval/b": 5.0}]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=True)
    log.write(1, {"eval/loss": math.nan, "train/loss": math.inf, "train/grad_norm": 1.0})
    log.close()
    want = [{"step": 1, "eval/loss": None, "train/loss": None, "train/grad_norm": 1.0}]
    assert strict_rows(tmp_path) == want
    assert steps_by_tag(tmp_path) == {"eval/loss": [1], "train/loss": [1], "train/grad_norm": [1]}
    # As other programs, or earlier versions, write it.
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "eval/loss": NaN, "train/loss": 1e999, "train/grad_norm": 1.0}\n'
    )
    MetricsLog(tmp_path, resume_step=1, evaluated=True, tensorboard=False).close()
    assert strict_rows(tmp_path) == want


def test_what_lies_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("notes")
    with pytest.raises(ConfigError, match=r"tensorboard is not a folder.* move it away"):
        MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=True)
    assert (tmp_path / "tensorboard").read_text() == "notes"
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(ConfigError, match=r"metrics.jsonl is a folder.* move it away"):
        read_rows(path)
    path.rmdir()
    path.symlink_to(path)  # whoever opens it is told that there are too many links
    with pytest.raises(StorageFailed, match=r"metrics.jsonl: OSError: "):
        MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=False)


def write_until_it_fails(log: MetricsLog) -> None:
    for step in range(1, 100):
        log.write(step, {"train/loss": 1.0})
        log.flush()


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_named_and_everything_released(tensorboard: bool, tmp_path: Path) -> None:
    def open_files() -> list[str]:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.lexists(link) and str(tmp_path) in os.readlink(link)]

    name = "tensorboard" if tensorboard else "metrics.jsonl"
    log = MetricsLog(tmp_path, resume_step=0, evaluated=False, tensorboard=tensorboard)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageFailed, match=f"{tmp_path / name}: .*too large"):
            write_until_it_fails(log)
        with contextlib.suppress(StorageFailed):
            log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert open_files() == []


def own_files(workdir: Path) -> list[Path]:
    return sorted((workdir / "tensorboard").glob("*tfevents*.nfnet_flax-*"))


def test_event_files_of_others_are_never_touched(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    write_run(run, range(1, 9), tensorboard=True)
    write_run(other, range(1, 20), tensorboard=True)
    writer = tf.summary.create_file_writer(str(run / "tensorboard"), filename_suffix=".baseline")
    with writer.as_default():
        for step in range(0, 40, 5):
            tf.summary.scalar("other/loss", 1.0, step=step)
    writer.close()
    shutil.copy(own_files(other)[0], run / "tensorboard")
    shutil.copy(next((other / "tensorboard" / "train").iterdir()), run / "tensorboard" / "train")
    name = (run / "tensorboard" / "run_name.txt").read_text().strip()
    found = [path for path in (run / "tensorboard").rglob("*") if path.is_file()]
    foreign = {path: path.read_bytes() for path in found if not path.name.endswith(name)}
    assert len(foreign) == 4  # with the name of the run's own
    write_run(run, range(5, 7), tensorboard=True)
    assert {path: path.read_bytes() for path in foreign} == foreign
    assert own_steps(run, foreign) == Counter({1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2})


def own_steps(workdir: Path, foreign: dict[Path, bytes]) -> Counter[int]:
    """How many values each step has in the files that are not of others."""
    events = [
        event for path in own_files(workdir) if path not in foreign for event in EventFileLoader(str(path)).Load()
    ]
    return Counter(event.step for event in events for _ in event.summary.value)


def test_a_damaged_event_file_is_kept_aside_and_filled_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, range(1, 9), tensorboard=True)
    (path,) = own_files(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3] ^= 0xFF
    path.write_bytes(damaged)
    capsys.readouterr()
    write_run(tmp_path, range(7, 10), tensorboard=True)
    (kept,) = (tmp_path / "damaged").iterdir()
    assert kept.read_bytes() == damaged
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"nfnet: {path} is damaged; it is kept as {kept}"
    assert "values that TensorBoard's files do not hold are written again from metrics.jsonl" in second
    want = list(range(1, 10))
    assert steps_by_tag(tmp_path) == {"train/loss": want, "time/data_wait_s": want}
    losses = EventAccumulator(str(tmp_path / "tensorboard"))
    losses.Reload()
    values = [float(tf.make_ndarray(event.tensor_proto)) for event in losses.Tensors("train/loss")]
    assert values == pytest.approx([1.0 / step for step in want])
    assert losses.SummaryMetadata("train/loss").plugin_data.plugin_name == "scalars"


def test_an_event_file_that_a_kill_cut_short_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, range(1, 9), tensorboard=True)
    (path,) = own_files(tmp_path)
    os.truncate(path, path.stat().st_size - 5)
    capsys.readouterr()
    write_run(tmp_path, range(8, 10), tensorboard=True)
    assert capsys.readouterr().err == ""
    want = list(range(1, 10))
    assert steps_by_tag(tmp_path) == {"train/loss": want, "time/data_wait_s": want}
    assert not (tmp_path / "damaged").exists()
