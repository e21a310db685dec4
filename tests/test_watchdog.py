"""The watchdog names what does not move, and counts the time during which the process ran, and no other."""

import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from nfnet_flax.training.watchdog import Watchdog, WatchdogConfig, watching
from tests import runs

# Nothing moves while it sleeps so many tenths of a second; two and a half seconds are the limit.
WATCHED = """
import sys, time
from nfnet_flax.training import watchdog

watchdog._LOOK_INTERVAL_S, watchdog._MAX_GAP_S = 0.05, 1.0
limits = watchdog.WatchdogConfig(first_timeout_s=2.5, timeout_s=2.5)
with watchdog.watching(limits, lambda text: print(text, flush=True)) as watch:
    watch.enter("step", 1)
    print("running", flush=True)
    for _ in range(int(sys.argv[1])):
        time.sleep(0.1)
print("done", flush=True)
"""


def watched(num_naps: int, suspended_s: float) -> str:
    """What the watched process prints, which is suspended for a while in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(num_naps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=runs.ROOT,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(suspended_s)
        process.send_signal(signal.SIGCONT)
        return process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()


def test_a_suspended_process_goes_on() -> None:
    assert watched(num_naps=5, suspended_s=5.0) == "done\n"


def test_one_that_hangs_is_told_after_a_pause_too() -> None:
    assert "no progress (step 1: step, for " in watched(num_naps=60, suspended_s=1.5)


def test_the_watchdog_names_what_it_waits_for(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    called = threading.Event()

    def on_stall(message: str) -> None:
        said.append(message)
        called.set()

    with watching(WatchdogConfig(first_timeout_s=1000.0, timeout_s=1.0), on_stall) as watchdog:
        for step in range(1, 4):
            watchdog.enter("input", step)
            watchdog.enter("step", step)
        assert called.wait(30)
    assert re.fullmatch(
        r"no progress \(step 3: step, for [1-9]\d* s\); the stacks of this process are printed above", said[0]
    )
    assert "test_watchdog.py" in capfd.readouterr().err


def test_compiling_may_take_longer_than_a_step() -> None:
    watchdog = Watchdog(WatchdogConfig(first_timeout_s=1000.0, timeout_s=1.0))
    limits = []
    for phase, step in (("step", 1), ("evaluation", 1), ("evaluation", 1), ("step", 2), ("evaluation", 2)):
        watchdog.enter(phase, step)  # type: ignore[arg-type]
        limits.append(watchdog.seconds_left() > 10)
    assert limits == [True, True, True, False, False]
