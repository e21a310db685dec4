"""One owner of a run's folder at a time: real processes that are stopped, suspended and killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfnet_flax import cli
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_LOST
from nfnet_flax.storage import LocalFolder
from nfnet_flax.training import layout, lease
from nfnet_flax.training.storage import StorageFailed
from tests import runs
from tests.test_processes import TINY

# Owns a folder until a line comes in. Its `pid` means nothing here where it is told that it runs in another container.
OWNER = """
import os, sys
from pathlib import Path
from nfnet_flax.config import ConfigError
from nfnet_flax.storage import LocalFolder
from nfnet_flax.training import lease

workdir, where = sys.argv[1:]
lease.BEAT_INTERVAL_S, lease.ELSEWHERE_TIMEOUT_S = 0.1, 2.0
if where == "elsewhere":
    lease._pid_namespace = lambda: "pid:[4711]"

def on_lost(error):
    print("lost:", error, flush=True)
    os._exit(5)

try:
    with lease.owning(LocalFolder(Path(workdir) / "owner"), on_lost):
        print("owns", flush=True)
        sys.stdin.readline()
except ConfigError as error:
    print("refused:", error, flush=True)
"""


def never(error: lease.LeaseLost) -> None:
    raise AssertionError(error)


@contextlib.contextmanager
def owner(workdir: Path, where: str = "here", expected: str = "owns\n") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(workdir), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=runs.ROOT,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == expected
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "ELSEWHERE_TIMEOUT_S", 2.0)


def test_the_second_is_refused_while_the_first_lives_and_comes_at_once_after_it(tmp_path: Path) -> None:
    with owner(tmp_path) as first:
        with pytest.raises(
            ConfigError, match=rf"is in use: process {first.pid} on host .* Wait for its end, stop it"
        ) as refused:
            lease.owning(LocalFolder(tmp_path / layout.OWNER), never).__enter__()
        assert "last sign of life at 20" in str(refused.value)
        found = lease.owner_of(LocalFolder(tmp_path / layout.OWNER))
        assert found is not None
        assert found[0].pid == first.pid
        first.send_signal(signal.SIGSTOP)  # a suspended process may go on at any time
        with pytest.raises(ConfigError, match="is in use"):
            lease.owning(LocalFolder(tmp_path / layout.OWNER), never).__enter__()
        first.send_signal(signal.SIGCONT)
        first.communicate("stop\n")
    assert lease.owner_of(LocalFolder(tmp_path / layout.OWNER)) is None
    started = time.monotonic()
    with lease.owning(LocalFolder(tmp_path / layout.OWNER), never) as mine:
        mine.check()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on host") as twice:  # nor twice in one process
            lease.owning(LocalFolder(tmp_path / layout.OWNER), never).__enter__()
        assert "by this very process" in str(twice.value)
        assert "kill" not in str(twice.value)
    assert time.monotonic() - started < 1.0


def test_after_sigkill_on_the_same_host_nobody_waits(tmp_path: Path) -> None:
    for _ in range(3):
        with owner(tmp_path) as killed:
            killed.kill()
            killed.wait()
        started = time.monotonic()
        with lease.owning(LocalFolder(tmp_path / layout.OWNER), never):
            assert time.monotonic() - started < 1.0
    assert len(list((tmp_path / layout.OWNER).iterdir())) == 2  # those before it are not kept


def test_an_owner_elsewhere_is_refused_while_it_gives_signs_of_life(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with owner(tmp_path, "elsewhere") as first:
        started = time.monotonic()
        with pytest.raises(ConfigError, match=f"is in use: process {first.pid} on host"):
            lease.owning(LocalFolder(tmp_path / layout.OWNER), never).__enter__()
        assert time.monotonic() - started < 2.0
        assert "waiting for up to 2 s" in capfd.readouterr().err
        first.kill()
        first.wait()
        started = time.monotonic()
        with lease.owning(LocalFolder(tmp_path / layout.OWNER), never):
            assert 2.0 <= time.monotonic() - started < 5.0


def test_who_was_suspended_and_replaced_ends_without_writing(tmp_path: Path) -> None:
    with owner(tmp_path, "elsewhere") as suspended:
        suspended.send_signal(signal.SIGSTOP)
        with lease.owning(LocalFolder(tmp_path / layout.OWNER), never) as mine:
            before = (tmp_path / layout.OWNER / "00000002.json").read_bytes()
            suspended.send_signal(signal.SIGCONT)
            assert suspended.wait(timeout=30) == EXIT_LOST
            assert suspended.stdout is not None
            printed = suspended.stdout.read()
            assert f"{tmp_path} belongs to process {os.getpid()} on host" in printed
            mine.check()
            assert (tmp_path / layout.OWNER / "00000002.json").read_bytes() == before


def test_a_copy_of_a_run_that_is_going_on_is_free(tmp_path: Path) -> None:
    with owner(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with lease.owning(LocalFolder(tmp_path / "copy" / layout.OWNER), never) as mine:
            mine.check()
            found = lease.owner_of(LocalFolder(tmp_path / "copy" / layout.OWNER))
            assert found is not None
            assert found[0].pid == os.getpid()


def test_of_many_that_come_at_once_one_wins(tmp_path: Path) -> None:
    with owner(tmp_path) as killed:
        killed.kill()
    all_at_once = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), "here"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=runs.ROOT,
        )
        for _ in range(4)
    ]
    try:
        first_lines = [process.stdout.readline() for process in all_at_once if process.stdout is not None]
    finally:
        for process in all_at_once:
            process.kill()
            process.communicate()
    assert first_lines.count("owns\n") == 1
    assert sum(line.startswith("refused: workdir") for line in first_lines) == 3


def test_a_folder_that_vanished_or_cannot_be_written_is_named(tmp_path: Path) -> None:
    with lease.owning(LocalFolder(tmp_path / "run" / layout.OWNER), never) as mine:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(StorageFailed, match="was deleted or moved"):
            mine.check()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        lease.owning(LocalFolder(tmp_path / "file" / "run" / layout.OWNER), never).__enter__()


def test_the_second_start_of_a_run_ends_with_code_2_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    first = runs.start(workdir, *TINY, "--num-steps=20000")
    assert first.stdout is not None
    try:
        for line in first.stdout:
            if line.startswith("step"):
                break
        second = runs.start(workdir, *TINY, "--num-steps=20000")
        printed = runs.finish(second)
        assert second.returncode == EXIT_BAD_INPUT, printed
        assert f"in use: process {first.pid} on host" in printed
        trains = f"process {first.pid} on host"
        assert cli.main(["doctor", "--workdir", str(workdir)]) == EXIT_DONE
        assert trains in capsys.readouterr().out
        os.killpg(first.pid, signal.SIGTERM)
        assert "stopping at step" in runs.finish(first)
        assert first.returncode == 75
        assert cli.main(["doctor", "--workdir", str(workdir)]) == EXIT_DONE
        assert trains not in capsys.readouterr().out
    finally:
        first.kill()
        first.wait()
