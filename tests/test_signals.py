"""Signals that stop one process: a request for the first, the end for the second, and none where they are ignored."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nfnet_flax.data.workers import STOP_SIGNALS
from nfnet_flax.training.preemption import StopPoint, stop_requests
from tests import runs
from tests.test_processes import ALONE


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_one_process_stops_at_its_next_point(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests(ALONE, owns_process=True) as stop:
        assert not stop.reached()
        os.kill(os.getpid(), number)
        wait_for_request(stop)
        assert stop.reached()
        os.kill(os.getpid(), number)  # at once again: a launcher that delivers it twice
    assert stop.reason == f"{number.name} to process 0"
    assert signal.getsignal(number) == before


SECOND = """
import ctypes
from nfnet_flax.parallel.processes import Processes
from nfnet_flax.training.preemption import stop_requests
mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with stop_requests(Processes(index=0, count=1, store=None), owns_process=True):
    print("ready", flush=True)
    lock(mutex)  # C code that never comes back: no Python handler runs, as in a compilation
"""


def test_a_second_signal_ends_even_a_compilation_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def wait_for_request(stop: StopPoint) -> None:
    """Waits until a signal has become a request."""
    deadline = time.monotonic() + 10
    while stop.reason is None and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_second_ctrl_c_in_a_notebook_interrupts_the_cell_and_leaves_the_kernel_alive() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_requests(ALONE, owns_process=False) as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        wait_for_request(stop)
        time.sleep(1.2)  # later than a launcher that delivers it twice
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        raise AssertionError("the second Ctrl-C was swallowed")
    assert stop.reason == "SIGINT to process 0"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with stop_requests(ALONE, owns_process=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for_request(stop)
        assert stop.reason == "SIGUSR1 to process 0"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
