"""Other places that show the metrics of a run: each row is there once, and none of them can end the run or delay it."""

import dataclasses
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax import cli, load_recipe
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from nfnet_flax.storage import BucketUrl
from nfnet_flax.telemetry import tracking as delivery
from nfnet_flax.telemetry.config import TelemetryConfig
from nfnet_flax.telemetry.flat_recipe import flat
from nfnet_flax.telemetry.trackers import MlflowTracker, RunEnd, RunStart, Tracker, WandbTracker
from nfnet_flax.telemetry.tracking import tracking
from nfnet_flax.training.lease import LeaseLost
from nfnet_flax.training.metrics import read_rows
from nfnet_flax.training.mirror import Mirror
from nfnet_flax.training.tracked import tracked
from tests import runs, stores
from tests.test_processes import TINY

LAST, KILLED_AT = 30, 12
AT_ONCE = ("MlflowTracker", "my_trackers:ToFile")
OPTIONS = (*TINY, f"--num-steps={LAST}", "--checkpoint.every-steps=8", "--eval-every-steps=10")
MINE = '''
"""Trackers of my own."""

import dataclasses
import json

from nfnet_flax.telemetry.trackers import Tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToFile(Tracker):
    path: str = "tracked.jsonl"

    def open(self, start):
        return Lines(self.path, start)


class Lines:
    def __init__(self, path, start):
        self.file = open(path, "a")
        self.run_id = start.run_id or "mine"
        self.write("open", id=start.run_id, step=start.step, seed=start.recipe["seed"])

    def write(self, what, **rest):
        self.file.write(json.dumps({"what": what, **rest}) + "\\n")
        self.file.flush()

    def on_metrics(self, step, metrics):
        self.write("row", step=step, metrics=dict(metrics))

    def close(self, end):
        self.write("close", outcome=end.outcome, reason=end.reason, step=end.step, metrics=dict(end.metrics))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Tracker):
    def open(self, start):
        return self

    run_id = None

    def on_metrics(self, step, metrics):
        raise RuntimeError("the service has moved")
'''
NAMES = ("trackers.json", "trackers")
HELD = f"""
import dataclasses, time
from nfnet_flax import cli
from nfnet_flax.training import loop

def assemble(*arguments, assemble=loop.assemble, **options):
    setup = assemble(*arguments, **options)
    def step(state, *others):
        if int(state.step) == {KILLED_AT + 2}:
            time.sleep(600)
        return setup.train_step(state, *others)
    return dataclasses.replace(setup, train_step=step)

if __name__ == "__main__":
    loop.assemble = assemble
    cli.program()
"""
"""`nfnet train` that does not get far beyond the step at which it is killed, however slow its trackers are."""
RECIPE = """
import dataclasses

import digits
import my_trackers
from nfnet_flax.telemetry.config import TelemetryConfig
from nfnet_flax.telemetry.trackers import MlflowTracker, WandbTracker


def recipe():
    trackers = (
        WandbTracker(project="digits", name="short", tags=("a test",), mode="offline"),
        my_trackers.Broken(),
        MlflowTracker(experiment="digits", tags=("team=vision",), mode="offline"),
        my_trackers.ToFile(path="{}"),
    )
    return dataclasses.replace(digits.recipe(), telemetry=TelemetryConfig(trackers=trackers))
"""


@dataclasses.dataclass(frozen=True)
class Lives:
    """A run that was killed and continued."""

    workdir: Path
    lines: list[dict[str, Any]]
    """What the tracker of a user's own wrote."""
    printed: str
    """Of the second start."""


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    folder = tmp_path_factory.mktemp("a run")
    (folder / "digits.py").write_text(runs.DIGITS.read_text())
    (folder / "my_trackers.py").write_text(MINE.lstrip())
    (folder / "my_run.py").write_text(RECIPE.format(folder / "tracked.jsonl").lstrip())
    options = (*runs.SMALL, *runs.FEW_IMAGES, *OPTIONS)
    record = folder / "run" / "trackers.json"
    first = runs.start(folder / "run", *options, recipe=folder / "my_run.py", program=("-c", HELD))
    assert first.stdout is not None
    next(line for line in first.stdout if line.startswith(f"step {KILLED_AT:>2}/"))
    end = time.monotonic() + 60
    while not (folder / "run" / "checkpoints" / "8").exists() or not has_rows(record):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    runs.finish(first)
    own = folder / "my_trackers.py"  # updates do not depend on it, so it may change
    own.write_text(own.read_text().replace("the service has moved", "the service has moved again"))
    second = runs.start(folder / "run", *options, recipe=folder / "my_run.py")
    printed = runs.finish(second)
    assert second.returncode == EXIT_DONE, printed
    lines = [json.loads(line) for line in (folder / "tracked.jsonl").read_text().splitlines()]
    return Lives(folder / "run", lines, printed)


def has_rows(record: Path) -> bool:
    """Whether it is on record that the trackers that store at once have the row, and what the third calls the run."""
    found = json.loads(record.read_text()) if record.exists() else {}
    return "WandbTracker" in found and all(key in found and found[key]["step"] >= KILLED_AT for key in AT_ONCE)


def is_same(first: Mapping[str, float | None], second: Mapping[str, float | None]) -> bool:
    """Whether metrics are equal; what is not a number is None in a file of JSON."""
    return {name: _or_none(value) for name, value in first.items()} == {
        name: _or_none(value) for name, value in second.items()
    }


def _or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def repeatable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.split("/")[0] in ("train", "eval", "eval_ema", "agc")}


def test_a_tracker_of_ones_own_gets_each_row_once_and_the_outcome(lives: Lives) -> None:
    first, second = (index for index, line in enumerate(lives.lines) if line["what"] == "open")
    assert [lives.lines[index]["id"] for index in (first, second)] == [None, "mine"]
    assert [lives.lines[index]["step"] for index in (first, second)] == [0, 8]
    assert lives.lines[0]["seed"] == 0
    before, after = lives.lines[second - 1], lives.lines[second + 1]
    if (before["what"], before.get("step")) == (after["what"], after.get("step")):  # killed between row and record
        assert is_same(repeatable(before["metrics"]), repeatable(after["metrics"]))
        del lives.lines[second + 1]
    given: dict[int, dict[str, float]] = {}
    for line in lives.lines:
        if line["what"] == "row":
            row = given.setdefault(line["step"], {})
            assert not row.keys() & line["metrics"].keys(), f"step {line['step']} is there twice"
            row.update(line["metrics"])
    rows = {row.pop("step"): row for row in read_rows(lives.workdir / "metrics.jsonl")}
    assert list(given) == list(range(1, LAST + 1)) == list(rows)
    assert all(is_same(repeatable(given[step]), repeatable(rows[step])) for step in rows)
    (closed,) = (line for line in lives.lines if line["what"] == "close")
    assert closed == lives.lines[-1]
    assert (closed["outcome"], closed["reason"], closed["step"]) == ("finished", "", LAST)
    assert closed["metrics"]["eval/top1"] == rows[LAST]["eval/top1"]


def test_a_broken_tracker_is_said_once_and_the_run_goes_on(lives: Lives) -> None:
    said = "my_trackers:Broken gets no metrics from now on, and the run goes on without it: RuntimeError: the service"
    assert lives.printed.count(said) == 1
    assert f"{said} has moved again" in lives.printed
    assert "WandbTracker" not in lives.printed
    assert "MlflowTracker" not in lives.printed
    found = json.loads((lives.workdir / "trackers.json").read_text())
    assert found["my_trackers:ToFile"] == {"run_id": "mine", "step": LAST, "evaluated": True}
    assert found["my_trackers:Broken"] == {"run_id": None, "step": -1, "evaluated": False}
    assert (found["WandbTracker"]["step"], found["MlflowTracker"]["step"]) == (LAST, LAST)
    assert not (lives.workdir / "code").exists()


def test_the_doctor_knows_the_files(lives: Lives, capsys: pytest.CaptureFixture[str]) -> None:
    code = ["--code", str(lives.workdir.parent / "my_trackers.py")]
    assert cli.main(["doctor", "--workdir", str(lives.workdir), *code, "--timeout-s", "300"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert f"trackers: MlflowTracker to step {LAST}, WandbTracker to step {LAST}, my_trackers:Broken, my_" in printed


def test_mlflow_has_each_row_once_in_one_run(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(lives.workdir / "trackers" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "digits")
    assert {name: run.data.tags[name] for name in ("team", "outcome")} == {"team": "vision", "outcome": "finished"}
    assert (run.data.params["optim.clipping"], run.data.params["model.widths"]) == ("AGC", "8")
    rows = read_rows(lives.workdir / "metrics.jsonl")
    for name in ("train/loss", "eval/top1"):
        found = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)}
        assert sorted(found) == [(row["step"], row[name]) for row in rows if name in row], name


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a file of W&B: blocks of 32 KiB, in which each piece of a record has a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(record)
            record = b""


def test_wandb_has_every_row_in_one_run(lives: Lives) -> None:
    parts = sorted((lives.workdir / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2
    assert len({path.name for path in parts}) == 1  # the same run
    given: dict[int, dict[str, Any]] = {}
    for path in parts:
        records = list(wandb_records(path))
        steps = []
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                steps.append(items["step"])
                assert items["_step"] == items["step"]
                row = given.setdefault(items["step"], {})
                assert all(row.get(name, value) == value for name, value in repeatable(items).items())
                row.update(repeatable(items))
        assert steps == sorted(set(steps))
    rows = read_rows(lives.workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == sorted(given)
    assert all(is_same(given[row["step"]], repeatable(row)) for row in rows)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, list(run.tags)) == ("digits", "short", ["a test"])
    configs = [item for record in records for item in [*record.run.config.update, *record.config.update]]
    assert {item.key: item.value_json for item in configs}["optim.clipping"] == '"AGC"'
    summary = {item.key: json.loads(item.value_json) for record in records for item in record.summary.update}
    assert (summary["outcome"], summary["eval/top1"]) == ("finished", rows[-1]["eval/top1"])
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_the_files_of_trackers_go_to_the_bucket_of_a_run(
    lives: Lives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files_in(folder: Path) -> dict[str, bytes]:
        found = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] in NAMES]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}

    want = files_in(lives.workdir)
    assert len(want) > 50
    with stores.store("gs") as url:
        stores.use(monkeypatch, "gs", url)
        place = BucketUrl("gs", stores.BUCKET, "runs/a")
        sent = tmp_path / "sent"
        shutil.copytree(lives.workdir, sent, symlinks=True, ignore=shutil.ignore_patterns("checkpoints", "best"))
        Mirror(place, sent, is_owner=True).push()
        for is_owner in (True, False):
            folder = tmp_path / f"owner {is_owner}"
            folder.mkdir()
            Mirror(place, folder, is_owner=is_owner).pull()
            assert files_in(folder) == (want if is_owner else {"trackers.json": want["trackers.json"]})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow(Tracker):
    """Takes its time."""

    seconds: float = 0.0
    error: str = ""
    takes: str = "on_metrics"

    def open(self, start: RunStart) -> "Slow":
        CALLS.append(("open", start.run_id))
        self._work("open")
        return self

    run_id = "slow"

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._work("on_metrics")
        CALLS.append((step, *metrics))

    def close(self, end: RunEnd) -> None:
        self._work("close")
        CALLS.append((end.outcome, end.reason))

    def _work(self, what: str) -> None:
        if what == self.takes:
            time.sleep(self.seconds)
            if self.error:
                raise SystemExit(self.error)


CALLS: list[tuple[Any, ...]] = []


@pytest.fixture
def follow(tmp_path: Path) -> Callable[..., Any]:
    CALLS.clear()

    def opened(*trackers: Tracker, rows: int = 0) -> Any:
        return tracking(
            trackers,
            name="mine",
            recipe={"seed": 0},
            folder=tmp_path / "trackers",
            record=tmp_path / "trackers.json",
            read_rows=lambda: [{"step": step, "train/loss": 1.0, "eval/loss": None} for step in range(1, rows + 1)],
            silent_after=LeaseLost,
        )

    return opened


def test_a_tracker_that_missed_rows_gets_them_at_the_next_start(
    follow: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with follow(Slow(), rows=2) as trackers:
        trackers.begin(2)
        trackers.on_metrics(3, {"train/loss": 1.0})
        trackers.ends("stopped", 3, {}, "SIGTERM")
    of_two = [(step, name) for step in (1, 2) for name in ("train/loss", "eval/loss")]
    found = CALLS.copy()
    assert found == [("open", None), *of_two, (3, "train/loss"), ("stopped", "SIGTERM")]
    CALLS.clear()

    def fails(error: Exception, *of_run: Tracker) -> None:
        with follow(*of_run, rows=3) as trackers:
            trackers.begin(3)
            while len([call for call in CALLS if call[0] == "open"]) < len(of_run):
                time.sleep(0.01)
            raise error

    with pytest.raises(ValueError, match="diverged"):
        fails(ValueError("diverged\nat last"), Slow(), Slow())
    of_first = [("open", "slow"), (3, "eval/loss"), ("failed", "ValueError: diverged")]
    of_second = [("open", None), *of_two, (3, "train/loss"), (3, "eval/loss"), ("failed", "ValueError: diverged")]
    assert sorted(CALLS, key=str) == sorted([*of_first, *of_second], key=str)
    CALLS.clear()
    (tmp_path / "trackers.json").write_text('{"test_tracke')
    with pytest.raises(LeaseLost):
        fails(LeaseLost("taken over"), Slow(takes="open", seconds=0.2))
    time.sleep(0.5)
    assert CALLS == [("open", None)]
    said = capsys.readouterr().err
    assert f"nfnet: trackers begin new runs: {tmp_path}/trackers.json is damaged" in said
    assert len(said.splitlines()) == 1


def test_only_the_first_process_has_trackers(tmp_path: Path) -> None:
    CALLS.clear()
    recipe = dataclasses.replace(load_recipe(runs.DIGITS), telemetry=TelemetryConfig(trackers=(Slow(),)))
    for is_first in (False, True):
        with tracked(recipe, tmp_path, is_first=is_first) as trackers:
            trackers.begin(0)
            trackers.on_metrics(1, {"train/loss": 1.0})
            trackers.ends("finished", 1, {})
        assert len(CALLS) == (3 if is_first else 0)


def test_a_run_does_not_wait_for_a_tracker(
    follow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(delivery, "END_WAIT_S", 0.5)
    monkeypatch.setattr(delivery, "MAX_WAITING", 3)
    began = time.monotonic()
    with follow(Slow(seconds=20.0), Slow(takes="close", error="no"), Slow(takes="open", seconds=20.0)) as trackers:
        trackers.begin(0)
        for step in range(1, 7):
            trackers.on_metrics(step, {"train/loss": 1.0})
    assert time.monotonic() - began < 5.0
    assert delivery.is_any_stuck()
    lines = capsys.readouterr().err.splitlines()
    name = "nfnet: tests.test_trackers:Slow"
    for key in (name, f"{name}-3"):
        assert f"{key} does not keep up: 3 rows of metrics wait, and it does not get all others" in lines
        assert f"{key} was not ready 0.5 s after the end of the run, and is not waited for any longer" in lines
    assert f"{name}-2 gets no metrics from now on, and the run goes on without it: SystemExit: no" in lines


@pytest.mark.parametrize("tracker", [WandbTracker(mode="offline"), MlflowTracker(mode="offline")])
def test_a_missing_package_is_named(
    tracker: Tracker,
    follow: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = type(tracker).__name__.removesuffix("Tracker").lower()
    monkeypatch.setitem(sys.modules, package, None)
    with follow(tracker) as trackers:
        trackers.begin(0)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"pip install 'nfnet_flax[{package}]'" in said


LEAVES = """
import atexit, sys, time
from pathlib import Path
from nfnet_flax import cli, load_recipe
from nfnet_flax.telemetry import tracking
from tests.test_trackers import Slow

tracking.END_WAIT_S = 0.1
folder = Path(sys.argv[1])
facts = {"name": "mine", "recipe": {}, "folder": folder, "record": folder / "trackers.json"}
with tracking.tracking((Slow(seconds=60.0, takes="open"),), read_rows=list, silent_after=KeyError, **facts) as found:
    found.begin(0)
atexit.register(time.sleep, 60.0)  # as libraries do that wait for their own threads
code = cli.main(["models", "no_network"])  # does not end this process
sys.argv = ["nfnet", "models", "nfnet_f0"]
print("code", code, flush=True)
cli.program()
"""


def test_a_command_ends_although_a_tracker_does_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, str(tmp_path)], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"code {EXIT_BAD_INPUT}" in done.stdout
    assert "nfnet_f0" in done.stdout


def test_wrong_values_are_refused_and_the_recipe_is_flat() -> None:
    with pytest.raises(ConfigError, match=r"MlflowTracker\.tags = 'vision': give each tag as NAME=VALUE"):
        MlflowTracker(tags=("vision",))
    with pytest.raises(ConfigError, match=r"MlflowTracker\.mode = 'offline': give online, or no tracking_uri"):
        MlflowTracker(mode="offline", tracking_uri="http://127.0.0.1:5000")
    found = flat(load_recipe(str(runs.DIGITS)))
    assert (found["optim.clipping"], found["optim.clipping.groups.0.pattern"]) == ("AGC", "head.kernel")
    assert found["data.mean"] == ", ".join(map(str, load_recipe(str(runs.DIGITS)).data.mean))
    assert all(value is None or isinstance(value, str | int | float) for value in found.values())
