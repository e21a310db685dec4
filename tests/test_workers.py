"""Worker processes of the input: killed, stuck and orphaned for real; and the runs that they belong to."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import xla_bridge

from nfnet_flax.data import pipeline
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
from nfnet_flax.data.prefetch import Batches, InputFailed
from nfnet_flax.data.source_config import SyntheticSource
from nfnet_flax.exit_codes import EXIT_INPUT_FAILED, EXIT_STOPPED
from nfnet_flax.run_clock import RunClock
from tests import runs

RELEASED = threading.Event()
"""Ends what is stuck in this process; in a worker nothing sets it."""
CONFIG = DataConfig(source=SyntheticSource(), image_size=8, eval_image_size=8, batch_size=4, prefetch_batches=2)


@dataclasses.dataclass(frozen=True)
class Probe:
    """Twelve examples; each label is told by the process that reads it, and the last example may misbehave."""

    behaviour: str = "fine"
    label: str = "pid"

    class_names = ("one",)
    unused = ()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 11:
            self._misbehave()
        label = os.getpid() if self.label == "pid" else int(xla_bridge.backends_are_initialized())
        return {"image": np.full((8, 8, 3), index, np.uint8), "label": np.int32(label)}

    def _misbehave(self) -> None:
        match self.behaviour:
            case "exit 0":
                os._exit(0)
            case "sys.exit":
                sys.exit(3)
            case "raise":
                raise LookupError("the shelf is empty")
            case "stick":
                stuck_here()
            case "slow":
                print("slow", flush=True)
                for _ in range(15):  # not at once: that would be over while the process is suspended
                    time.sleep(0.1)

    def fingerprint(self) -> str:
        return "probe"

    def contents(self) -> str:
        return ""

    def describe(self, index: int) -> str:
        return f"probe number {index}"


def stuck_here() -> None:
    RELEASED.wait(60)


def batches(source: Probe, **changes: Any) -> Batches:
    config = dataclasses.replace(CONFIG, **changes)
    return pipeline.train_batches(
        config, source, seed=0, start_step=7, num_steps=1000, process_index=0, num_processes=1
    )


def workers_of(pid: int) -> list[int]:
    """Worker processes that a process has started and that still run."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended since
            children += map(int, (task / "children").read_text().split())
    return [child for child in children if b"nfnet_flax.data.workers" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids: list[int], within_s: float) -> bool:
    """Whether none of the processes runs any more, at the latest after `within_s`."""
    deadline = time.monotonic() + within_s
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, pids))


def first_failure(iterator: Batches) -> str:
    with iterator, pytest.raises(InputFailed) as caught:
        list(iterator)
    return str(caught.value)


def test_a_killed_worker_is_named_with_the_step_it_owed() -> None:
    with batches(Probe(), num_workers=1) as iterator:
        (pid,) = set(next(iterator)["label"].tolist())
        assert workers_of(os.getpid()) == [pid]
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        message = first_failure(iterator)
    assert time.monotonic() - began < 30
    found = re.match(
        rf"input worker 0 \(pid {pid}\) was killed by SIGKILL .*; it had not delivered the batch of step (\d+)$",
        message,
    )
    assert found, message
    assert 8 <= int(found[1]) <= 10
    assert workers_of(os.getpid()) == []


@pytest.mark.parametrize(
    ("behaviour", "complaint"),
    [
        ("exit 0", r"input worker 0 \(pid \d+\) exited with code 0; it had not delivered the batch of step \d+$"),
        ("sys.exit", r"input worker 0 \(pid \d+\) exited with code 3; it had not delivered the batch of step \d+$"),
        (
            "raise",
            r"(?s)input worker 0 \(pid \d+\), preparing the batch of step \d+: LookupError: the shelf is empty; "
            r"in probe number 11 \(example 11\)\nTraceback .*_misbehave",
        ),
    ],
)
def test_a_worker_that_ends_or_raises_is_named(behaviour: str, complaint: str) -> None:
    message = first_failure(batches(Probe(behaviour), num_workers=1))
    assert re.match(complaint, message), message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_stuck_is_named_and_shows_its_stacks(capfd: pytest.CaptureFixture[str], num_workers: int) -> None:
    lane = r"input worker 0 \(pid \d+\)" if num_workers else "input thread 0"
    try:
        timeout_s = 15.0 if num_workers else 1.0  # a worker takes a second to start, and many on a busy machine
        iterator = batches(Probe("stick"), num_workers=num_workers, num_threads=1, stall_timeout_s=timeout_s)
        message = first_failure(iterator)
    finally:
        RELEASED.set()
    assert re.match(
        rf"{lane} is stuck: it has not delivered the batch of step \d+ within .* = {timeout_s:g} s", message
    ), message
    printed = capfd.readouterr().err
    assert "in stuck_here" in printed
    assert workers_of(os.getpid()) == []


@pytest.mark.parametrize(("behaviour", "error"), [("raise", "LookupError: the shelf"), ("sys.exit", "SystemExit: 3")])
def test_a_thread_that_raises_is_named_however_often_one_asks(behaviour: str, error: str) -> None:
    with batches(Probe(behaviour), num_threads=1) as iterator:
        for _ in range(3):
            with pytest.raises(InputFailed, match=f"input thread 0, preparing the batch of step .*: {error}"):
                list(iterator)


def test_signals_that_stop_a_run_do_not_reach_workers() -> None:
    with batches(Probe(), num_workers=2) as iterator:
        pids = workers_of(os.getpid())
        assert len(pids) == 2
        for number in (signal.SIGTERM, signal.SIGINT):  # before Python has started in them
            for pid in pids:
                os.kill(pid, number)
        seen = set(next(iterator)["label"].tolist())
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        for _ in range(20):
            seen |= set(next(iterator)["label"].tolist())
        assert seen == set(pids)
    assert not any(map(is_running, pids))


def test_a_worker_never_starts_a_jax_backend() -> None:
    everything = {
        "batch_size": 16,
        "augment": CropAugment(),
        "randaugment": RandAugmentConfig(),
        "mixing": MixingConfig(group_size=8),
    }
    jax.devices()
    with batches(Probe(label="backend"), **everything) as iterator:
        assert all(next(iterator)["label"] == 1)  # here there is one, so the probe can tell
    with batches(Probe(label="backend"), num_workers=1, **everything) as iterator:
        assert all(all(next(iterator)["label"] == 0) for _ in range(5))


ORPHANS = """
import os, sys
from tests.test_workers import InputFailed, Probe, batches, workers_of
# On a loaded machine a worker takes seconds to start.
iterator = batches(Probe(sys.argv[1]), num_workers=2, stall_timeout_s=3.0 if sys.argv[1] == "stick" else 60.0)
try:
    for _ in range(4):
        next(iterator)
except InputFailed:
    assert sys.argv[1] == "stick"
print(*workers_of(os.getpid()), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("behaviour", ["fine", "stick"])
def test_workers_end_when_the_main_process_is_killed(behaviour: str) -> None:
    main = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, behaviour],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=runs.ROOT,
    )
    assert main.stdout is not None
    pids = [int(word) for word in main.stdout.readline().split()]
    assert pids
    assert all(map(is_running, pids))
    main.kill()
    _, errors = main.communicate(timeout=30)  # ends once every process that holds the pipe has
    assert "Traceback" not in errors
    assert (errors == "") == (behaviour == "fine")
    assert all_end(pids, within_s=5)


SUSPENDED = """
from tests.test_workers import Probe, batches
with batches(Probe("slow"), num_threads=1, stall_timeout_s=5.0) as iterator:
    for _ in range(4):
        next(iterator)
print("went on")
"""


def test_a_process_that_was_suspended_is_not_taken_for_stuck() -> None:
    main = subprocess.Popen([sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)
    assert main.stdout is not None
    assert main.stdout.readline() == "slow\n"
    main.send_signal(signal.SIGSTOP)
    time.sleep(6)  # longer than the limit
    main.send_signal(signal.SIGCONT)
    printed, _ = main.communicate(timeout=60)
    assert printed.endswith("went on\n")
    assert main.returncode == 0


def test_a_clock_counts_the_time_between_readings_but_not_gaps() -> None:
    clock = RunClock(max_gap_s=1.0)
    time.sleep(0.3)
    first = clock.seconds()
    assert 0.3 <= first <= 1
    time.sleep(1.5)
    assert 0 < clock.seconds() - first < 0.6


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def left_behind(before: set[str]) -> set[str]:
    """What is new in shared memory and used by no running process: other tests run at the same time, and the worker
    pool of `tools/prepare_imagenet.py` has semaphores there as long as it lives."""
    new = shared_memory() - before
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # that process has ended since
            text = maps.read_text()
            new = {name for name in new if f"/dev/shm/{name}" not in text}
    return new & shared_memory()


def test_shared_memory_that_is_used_is_told_from_what_was_left_behind() -> None:
    before = shared_memory()
    memory = SharedMemory(create=True, size=64)
    name = memory.name
    assert name in shared_memory() - before
    assert name not in left_behind(before)
    memory.close()  # still in the folder, and no process has it mapped
    assert name in left_behind(before)
    memory.unlink()
    assert name not in left_behind(before)


def test_a_stopped_run_saves_and_a_killed_worker_ends_the_next(tmp_path: Path) -> None:
    before = shared_memory()
    options = ("--num-steps=5000", "--data.num-workers=2", "--eval-every-steps=5000", "--checkpoint.every-steps=5000")
    process = runs.start(tmp_path, *options)
    printed = runs.signal_at(process, 12, signal.SIGTERM)  # to the group, workers included
    assert process.returncode == EXIT_STOPPED, printed
    assert "Traceback" not in printed
    (step,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert step >= 12
    assert all(np.all(np.isfinite(array)) for array in runs.saved_arrays(tmp_path, step).values())

    process = runs.start(tmp_path, *options)
    assert process.stdout is not None
    printed, killed, killed_at = "", 0, 0.0
    for line in process.stdout:
        printed += line
        if not killed and line.startswith("step "):
            killed, *others = workers_of(process.pid)
            os.kill(killed, signal.SIGKILL)
            killed_at = time.monotonic()
    runs.finish(process)
    assert time.monotonic() - killed_at < 30
    assert f"continuing from step {step} " in printed
    assert process.returncode == EXIT_INPUT_FAILED, printed
    assert re.search(rf"nfnet: the input failed: input worker \d \(pid {killed}\) was killed by SIGKILL", printed), (
        printed
    )
    assert "Traceback" not in printed
    assert others
    assert all_end(others, within_s=5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]
    assert left_behind(before) == set()
