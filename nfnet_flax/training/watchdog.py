"""Ends a run in which nothing moves, with the stacks of all threads, instead of hanging until someone looks."""

import contextlib
import dataclasses
import faulthandler
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Literal

from nfnet_flax.config import check_types, require
from nfnet_flax.run_clock import RunClock

Phase = Literal["start", "input", "step", "evaluation", "save", "end"]
"""What the loop is busy with: `start` is devices, sources and restoring; `end` waits for what is being written."""
_LOOK_INTERVAL_S = 1.0
_MAX_GAP_S = 10 * _LOOK_INTERVAL_S
"""A longer time between two looks does not count: this process did not run meanwhile (it was suspended, say)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long nothing may move. No update depends on it."""

    first_timeout_s: float = 1800.0
    """Longest time for the first step, batch, evaluation or save of a process, compilation included."""
    timeout_s: float = 600.0
    """Longest time for each later step, batch of the input or of the evaluation, or save."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("first_timeout_s", "timeout_s"):
            require(getattr(self, name) >= 1, f"watchdog.{name}", getattr(self, name), "must be at least 1")


class Watchdog:
    """Knows what the loop is busy with and since when; made by `watching`."""

    def __init__(self, config: WatchdogConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._phase: Phase = "start"
        self._step = 0
        self._clock = RunClock(max_gap_s=_MAX_GAP_S)
        self._since_s = self._clock.seconds()
        self._seen: set[Phase] = set()
        self._timeout_s = config.first_timeout_s

    def enter(self, phase: Phase, step: int) -> None:
        """Notes what the loop does from now on; to be called again for each step or batch of it."""
        with self._lock:
            if phase != self._phase or step != self._step:
                self._seen.add(self._phase)
            self._timeout_s = self._config.timeout_s if phase in self._seen else self._config.first_timeout_s
            self._phase, self._step, self._since_s = phase, step, self._clock.seconds()

    def describe(self) -> str:
        """Such as `step 12: evaluation, for 3 s`."""
        with self._lock:
            return f"step {self._step}: {self._phase}, for {self._clock.seconds() - self._since_s:.0f} s"

    def seconds_left(self) -> float:
        """How much longer nothing may move; at most 0 where it has been too long."""
        with self._lock:
            return self._since_s + self._timeout_s - self._clock.seconds()


@contextlib.contextmanager
def watching(config: WatchdogConfig, on_stall: Callable[[str], None]) -> Iterator[Watchdog]:
    """Yields a watchdog whose thread writes the stacks and calls `on_stall(message)` when nothing moves for too long.

    Args:
      config: how long.
      on_stall: called once, from the thread; it ends the process.
    """
    watchdog = Watchdog(config)
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_LOOK_INTERVAL_S):
            if watchdog.seconds_left() <= 0:
                # Not `sys.stderr`: whoever replaced it need not have a file descriptor.
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
                message = f"nothing moved ({watchdog.describe()}); the stacks of this process are printed above"
                on_stall(message)
                return

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield watchdog
    finally:
        is_over.set()
