"""Requests to stop: SIGTERM, SIGUSR1 (sent by Slurm), SIGHUP (lost terminal) or Ctrl-C to any process stops all
processes at the same point.

A thread receives the signals, because a handler in Python would not run until the main thread returns from a
compilation or a collective. JAX's own notifier is not used: it supports only SIGTERM, and no run of one process.
"""

import _thread
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax

from nfnet_flax.data.workers import STOP_SIGNALS
from nfnet_flax.parallel.processes import Processes

_REPEAT_S = 1.0
"""A signal within this time after the first is the same request: launchers may send it to a group and to a process."""
_POLL_S = 60.0
_ANSWER_TIMEOUT_S = 600.0


class StopPoint:
    """The point at which the run has to stop, which is the same in all processes.

    All processes pass the same points in the same order and count them. When one process is asked to stop, every
    process reports how many points it has passed and passes no further point until all have reported. All stop at the
    first point that no process had passed: the largest count plus one. No process needs to finish its step for this, as
    a thread reports while the process waits for the others in a computation.
    """

    def __init__(self, processes: Processes) -> None:
        """Starts listening to the other processes, unless this is the only process of the run."""
        self._processes = processes
        self._lock = threading.Lock()
        self._num_passed = 0
        self._stop_at: int | None = None
        self.reason: str | None = None
        """Which process was asked to stop, and by which signal; None: none was."""
        if processes.count > 1:
            threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def reached(self) -> bool:
        """Passes a point. Returns True from the point on at which all processes stop."""
        with self._lock:
            self._num_passed += 1
            return self._stop_at is not None and self._num_passed >= self._stop_at

    def request(self, reason: str) -> None:
        """Asks all processes to stop at the next point that they can agree on."""
        if self._processes.count > 1:
            self._processes.put("stop/requested", reason)
            return
        with self._lock:
            self.reason, self._stop_at = reason, self._num_passed + 1

    def _listen(self) -> None:
        while True:
            try:
                reason = self._processes.wait_for("stop/requested", _POLL_S)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # process 0 has ended, which `parallel.peers` also notices
        with self._lock:
            self._processes.put(f"stop/passed/{self._processes.index}", self._num_passed)
            try:
                passed = [
                    self._processes.wait_for(f"stop/passed/{index}", _ANSWER_TIMEOUT_S)
                    for index in range(self._processes.count)
                ]
            except jax.errors.JaxRuntimeError:
                return  # as above
            self.reason, self._stop_at = reason, max(passed) + 1


@contextlib.contextmanager
def stop_requests(
    processes: Processes, *, owns_process: bool, others: Mapping[signal.Signals, Callable[[], object]] | None = None
) -> Iterator[StopPoint]:
    """Yields the point at which to stop; within the context, signals are requests to stop.

    A signal that the process ignores is not changed: `nohup` ignores SIGHUP for its command, and a shell ignores Ctrl-C
    for a script's background job. Python can install handlers only in the main thread; in another thread, signals to
    this process are not requests.

    Args:
      processes: the processes of this run.
      owns_process: whether the process only runs this training. A second signal then ends it at once, whatever it is
        doing. Otherwise, as in a notebook, the second signal has its usual effect: Ctrl-C raises `KeyboardInterrupt` as
        soon as Python returns from a compilation.
      others: signals that are no requests to stop, with what is called, in a thread, when they arrive. A signal for
        which the program has a handler of its own is left to it.
    """
    point = StopPoint(processes)
    if threading.current_thread() is not threading.main_thread():
        yield point
        return
    requested_at: list[float] = []
    acts = {number: act for number, act in (others or {}).items() if signal.getsignal(number) is signal.SIG_DFL}

    def on_signal(number: int) -> bool:
        if number in acts:
            acts[signal.Signals(number)]()
            return False
        if not requested_at:
            requested_at.append(time.monotonic())
            point.request(f"{signal.Signals(number).name} to process {processes.index}")
            return False
        # The kernel and each shell in between send SIGHUP for a lost terminal, so a second one means nothing.
        is_second = number != signal.SIGHUP and time.monotonic() - requested_at[0] > _REPEAT_S
        if is_second and owns_process:
            os._exit(128 + number)
        return is_second

    with _signals_in_a_thread((*STOP_SIGNALS, *acts), on_signal):
        yield point


@contextlib.contextmanager
def _signals_in_a_thread(numbers: Sequence[signal.Signals], on_signal: Callable[[int], bool]) -> Iterator[None]:
    """Calls `on_signal` in a thread for each of these signals; if it returns True, the signal has its usual effect."""
    received, written = socket.socketpair()
    written.setblocking(False)
    to_repeat: set[int] = set()

    def receive() -> None:
        while number := received.recv(1):
            if number[0] in previous and not to_repeat and on_signal(number[0]):
                to_repeat.add(number[0])
                _thread.interrupt_main(signal.Signals(number[0]))  # runs the handler below in the main thread

    def handler(number: int, frame: FrameType | None) -> None:
        if number in to_repeat:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    handlers = {number: signal.getsignal(number) for number in numbers}
    previous: dict[int, Any] = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}
    thread = threading.Thread(target=receive, name="signals", daemon=True)
    thread.start()
    previous_fd = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(previous_fd)
        written.close()  # ends the thread
        thread.join()
        received.close()
