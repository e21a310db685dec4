"""Runs in buckets: real processes that are killed, started on another machine, refused and damaged."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nfnet_flax
from nfnet_flax import cli
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_LOST, EXIT_STOPPED, EXIT_STORAGE_FAILED
from nfnet_flax.storage import BucketFolder, BucketUrl, bucket
from nfnet_flax.training.layout import COMMIT
from nfnet_flax.training.metrics import read_rows
from nfnet_flax.training.mirror import DAMAGED
from tests import runs, stores
from tests.test_processes import TINY

URL = "{}://bucket/runs/a"
OPTIONS = (*TINY, "--checkpoint.every-steps=4", "--eval-every-steps=6", "--checkpoint.keep-last=2")
LAST = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, on a disk and without an interruption."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = runs.start(workdir, *OPTIONS)
    assert "finished" in runs.finish(process)
    return workdir


@pytest.fixture(params=stores.KINDS)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketUrl]:
    with stores.store(request.param) as url:
        for name, value in stores.environment(request.param, url).items():
            monkeypatch.setenv(name, value)
        bucket._file_system.cache_clear()
        yield BucketUrl(request.param, stores.BUCKET, "runs/a")


READ_WITH_SMALL_FILES = """
import resource, sys
import nfnet_flax
nfnet_flax.Run  # loads what it needs
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
nfnet_flax.Run(sys.argv[1]).weights()
"""


ELSEWHERE = """
import sys
from nfnet_flax.training import lease

machine = sys.argv.pop(1)
lease._pid_namespace = lambda: machine  # as on another host
lease.ELSEWHERE_TIMEOUT_S = 3.0
from nfnet_flax.cli import main
sys.exit(main())
"""


def start(place: BucketUrl, machine: Path, *options: str) -> subprocess.Popen[str]:
    """Starts the run on a machine that has its own folder for temporary files."""
    machine.mkdir(exist_ok=True)
    return runs.start(str(place), *OPTIONS, *options, environment={"TMPDIR": str(machine)})


def assert_equal(whole: Path, place: BucketUrl) -> None:
    copy = runs.copied(str(place), LAST)
    want, got = runs.saved_arrays(whole, LAST), runs.saved_arrays(copy, LAST)
    assert want.keys() == got.keys()
    assert not [name for name in want if want[name].tobytes() != got[name].tobytes()]
    rows = [
        [
            {name: value for name, value in row.items() if not name.startswith(("throughput", "time"))}
            for row in read_rows(workdir / "metrics.jsonl")
        ]
        for workdir in (whole, copy)
    ]
    assert rows[0] == rows[1]


def test_a_run_that_is_killed_while_it_saves_continues_on_another_machine(
    whole: Path, place: BucketUrl, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = BucketFolder(place)
    first = start(place, tmp_path / "first")
    end = time.monotonic() + 120
    while time.monotonic() < end:  # killed when some objects of a checkpoint are there, and not its last one
        names = folder.files("checkpoints")
        if names and first.poll() is None:
            first.kill()
            break
    printed = runs.finish(first)
    assert first.returncode == -signal.SIGKILL, printed
    second = start(place, tmp_path / "second")
    printed = runs.signal_at(second, 10, signal.SIGTERM)
    assert second.returncode == EXIT_STOPPED, printed
    damaged = folder.read("metrics.jsonl") + b"no row\n"
    folder.put("metrics.jsonl", damaged)
    third = start(place, tmp_path / "third")
    printed = runs.finish(third)
    assert third.returncode == EXIT_DONE, printed
    continued = re.search(rf"continuing from step (\d+) in {place}\n", printed)
    assert continued is not None
    assert int(continued[1]) >= 10, printed
    assert str(tmp_path) not in printed
    assert folder.read("damaged/metrics.jsonl") == damaged
    assert f"kept as {place}/damaged/metrics.jsonl" in printed
    assert_equal(whole, place)
    logs = {name: folder.read(name).decode() for name in sorted(folder.files("log"))}
    assert "stopping at step" in list(logs.values())[-2]
    assert continued[0] in list(logs.values())[-1]
    assert not (runs.copied(str(place), LAST) / "log").exists()  # nobody reads them on another machine
    for machine in ("second", "third"):
        assert list((tmp_path / machine).iterdir()) == []
    steps = {name.split("/")[0] for name in folder.files("checkpoints") for name in [name.removeprefix("checkpoints/")]}
    assert steps == {"8", "12"} or steps == {continued[1], "12"}
    # Readers on any machine.
    run = nfnet_flax.Run(str(place))
    assert run.steps()[0] == LAST
    assert run.weights("raw").keys() == nfnet_flax.Run(whole).weights("raw").keys()
    signals = tmp_path / "signals.csv"
    for argv in (
        ["signal", str(place), "--batch-size=2", "--csv", str(signals)],
        ["eval", "--workdir", str(place)],
        ["doctor", "--workdir", str(place)],
    ):
        assert cli.main(argv) == EXIT_DONE, capfd.readouterr()
    assert f"run 'digits', step {LAST}, seed 0, ema parameters" in signals.read_text()
    assert "nothing is wrong" in capfd.readouterr().out


def test_a_damaged_checkpoint_is_marked_and_the_one_before_it_is_used(
    whole: Path, place: BucketUrl, tmp_path: Path
) -> None:
    assert "finished" in runs.finish(start(place, tmp_path / "first"))
    folder = BucketFolder(place)
    commit = json.loads(folder.read(f"checkpoints/{LAST}/{COMMIT}"))
    name = next(name for name in commit["files"] if "/d/" in name)
    content = bytearray(folder.read(f"checkpoints/{LAST}/{name}"))
    content[len(content) // 2] ^= 1
    folder.put(f"checkpoints/{LAST}/{name}", bytes(content))
    good = nfnet_flax.Run(whole).weights("raw", checkpoint=8)
    found = nfnet_flax.Run(str(place)).weights("raw")
    assert all(np.array_equal(found[name], good[name]) for name in good)
    second = start(place, tmp_path / "second", "--num-steps=11")
    printed = runs.finish(second)
    assert second.returncode == EXIT_BAD_INPUT, printed  # another length is another run
    third = start(place, tmp_path / "third")
    printed = runs.finish(third)
    assert third.returncode == EXIT_DONE, printed
    assert f"checkpoint {place}/checkpoints/{LAST} is damaged and skipped: {name} is not what was saved" in printed
    assert f"is marked as damaged by {DAMAGED}" in printed
    assert f"checkpoints/{LAST}/{DAMAGED}" not in folder.files()  # the run has saved this step again
    assert_equal(whole, place)


def test_a_second_start_is_refused_and_two_processes_share_one_bucket(
    whole: Path, place: BucketUrl, tmp_path: Path
) -> None:
    machine = tmp_path / "both"
    machine.mkdir()
    both = runs.start_all(str(place), 2, *OPTIONS, environment={"TMPDIR": str(machine)})
    folder = BucketFolder(place)
    while not folder.files("owner") and both[0].poll() is None:
        time.sleep(0.05)
    before = folder.files()
    second = start(place, tmp_path / "second")
    printed = runs.finish(second)
    assert second.returncode == EXIT_BAD_INPUT, printed
    assert f"workdir '{place}' is in use: process {both[0].pid} on host" in printed
    gone = before.keys() - folder.files().keys()
    assert all(name.startswith(("checkpoints", "best")) for name in gone), gone
    printed = "".join(runs.finish(process) for process in both)
    assert [process.returncode for process in both] == [EXIT_DONE] * 2, printed
    assert list(machine.iterdir()) == []
    # Sums over two devices have other last bits (tools/soak.py compares with a run of two processes on a disk).
    copy = runs.copied(str(place), LAST)
    want, got = runs.saved_arrays(whole, LAST), runs.saved_arrays(copy, LAST)
    assert want.keys() == got.keys()
    assert all(np.allclose(got[name], want[name], rtol=1e-3, atol=1e-5) for name in want)
    last = start(place, tmp_path / "last")
    printed = runs.finish(last)
    assert (last.returncode, "continuing from step 12" in printed) == (EXIT_DONE, True), printed


@pytest.mark.parametrize("place", ["gs"], indirect=True)  # what forbids it to write is the same for all stores
def test_an_owner_that_was_suspended_and_replaced_changes_nothing_when_it_continues(
    whole: Path, place: BucketUrl, tmp_path: Path
) -> None:
    folder = BucketFolder(place)

    def start_on(machine: str) -> subprocess.Popen[str]:
        (tmp_path / machine).mkdir()
        environment = {"TMPDIR": str(tmp_path / machine)}
        return runs.start(str(place), *OPTIONS, program=("-c", ELSEWHERE, machine), environment=environment)

    def contents() -> dict[str, bytes]:
        # Requests that it had begun are sent when it continues: they are objects of the checkpoint that it was sending,
        # and the digests in `commit.json` tell those of the second run from them.
        return {name: folder.read(name) for name in folder.files() if not name.startswith("checkpoints/8/")}

    suspended = start_on("first")
    try:
        end = time.monotonic() + 120
        while not folder.files("checkpoints/8"):  # some objects of its second checkpoint are there
            assert time.monotonic() < end
            assert suspended.poll() is None
        suspended.send_signal(signal.SIGSTOP)
        second = start_on("second")
        printed = runs.finish(second)
        assert second.returncode == EXIT_DONE, printed
        assert "waiting for up to 3 s for another one" in printed
        before = contents()
        suspended.send_signal(signal.SIGCONT)
        printed = runs.finish(suspended)
    finally:
        suspended.kill()
    assert suspended.returncode == EXIT_LOST, printed
    assert f"nfnet: {place} belongs to process {second.pid} on host" in printed
    assert contents() == before
    assert_equal(whole, place)


@pytest.mark.parametrize("kind", stores.KINDS)
def test_a_store_that_fails_ends_the_run_with_the_reason_and_older_checkpoints_are_good(
    kind: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stores.proxied(kind, []) as (url, set_rules):
        for name, value in stores.environment(kind, url).items():
            monkeypatch.setenv(name, value)
        bucket._file_system.cache_clear()
        place = BucketUrl(kind, stores.BUCKET, "runs/a")
        # The permission ends after the first checkpoint, which is about 30 objects with the records.
        set_rules([{"do": "status", "status": 403, "method": "PUT|POST", "after": 45, "body": "no"}])
        first = start(place, tmp_path / "first")
        printed = runs.finish(first)
        assert first.returncode == EXIT_STORAGE_FAILED, printed
        assert "the permission is missing" in printed
        set_rules([{"do": "status", "status": 403, "method": "DELETE", "body": "no"}])
        second = start(place, tmp_path / "second")
        printed = runs.finish(second)
        assert second.returncode == EXIT_DONE, printed
        assert f"continuing from step 4 in {place}" in printed
        assert "old checkpoints could not be deleted" in printed
        set_rules([])
        assert_equal(whole, place)
        assert os.environ[next(iter(stores.environment(kind, url)))] == url


def test_a_run_that_is_copied_by_hand_continues_on_either_side(whole: Path, place: BucketUrl, tmp_path: Path) -> None:
    """A run of a disk that is copied into a bucket, and back, object by object."""
    folder = BucketFolder(place)
    for path in whole.rglob("*"):
        name = path.relative_to(whole).as_posix()
        if path.is_file() and not name.startswith((f"checkpoints/{LAST}", "owner")):
            folder.upload(path, name)
    folder.upload(whole / "recipe.json", "below/recipe.json")  # another run, which nobody touches
    folder.upload(whole / "metrics.jsonl", "below/metrics.jsonl")
    first = start(place, tmp_path / "first")
    printed = runs.finish(first)
    assert first.returncode == EXIT_DONE, printed
    assert f"continuing from step 8 in {place}" in printed
    assert_equal(whole, place)
    assert {"below/recipe.json", "below/metrics.jsonl"} <= folder.files().keys()
    copy = tmp_path / "copy"
    for name in folder.files():
        if not name.startswith("owner"):
            folder.download(name, copy / name)
    process = runs.start(copy, *OPTIONS)
    printed = runs.finish(process)
    assert process.returncode == EXIT_DONE, printed
    assert "continuing from step 12" in printed
    # Another reader has a disk that takes no files of this size.
    reader = [sys.executable, "-c", READ_WITH_SMALL_FILES, str(place)]
    done = subprocess.run(reader, capture_output=True, text=True, check=False, cwd=runs.ROOT)
    assert f"StorageFailed: the folder for temporary files, {tempfile.gettempdir()}, cannot hold" in done.stderr
