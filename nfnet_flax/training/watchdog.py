"""Ends a run that makes no progress, and prints the stacks of all threads, instead of letting it hang."""

import contextlib
import dataclasses
import faulthandler
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Literal

from nfnet_flax import session_log
from nfnet_flax.config import check_types, require
from nfnet_flax.output import draw_no_more
from nfnet_flax.run_clock import RunClock

Phase = Literal["start", "input", "step", "evaluation", "save", "end"]
"""What the loop is doing: `start` opens devices and sources and restores the state; `end` waits for background
writes."""
_LOOK_INTERVAL_S = 1.0
_MAX_GAP_S = 10 * _LOOK_INTERVAL_S
"""A longer time between two readings does not count, because this process did not run meanwhile (it was suspended)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long a run may make no progress. Updates do not depend on it."""

    first_timeout_s: float = 1800.0
    """Longest time for the first step, batch, evaluation or save of a process, in seconds, compilation included."""
    timeout_s: float = 600.0
    """Longest time for each later step, training batch, evaluation batch or save, in seconds."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("first_timeout_s", "timeout_s"):
            require(getattr(self, name) >= 1, f"watchdog.{name}", getattr(self, name), "must be at least 1")


class Watchdog:
    """Records what the loop is doing and since when; made by `watching`."""

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
        """Records what the loop does from now on; to be called for each step or batch."""
        with self._lock:
            if phase != self._phase or step != self._step:
                self._seen.add(self._phase)
            self._timeout_s = self._config.timeout_s if phase in self._seen else self._config.first_timeout_s
            self._phase, self._step, self._since_s = phase, step, self._clock.seconds()

    def describe(self) -> str:
        """What the loop is doing, as text, such as `step 12: evaluation, for 3 s`."""
        with self._lock:
            return f"step {self._step}: {self._phase}, for {self._clock.seconds() - self._since_s:.0f} s"

    def seconds_left(self) -> float:
        """Time until the limit, in seconds; 0 or negative if the limit is reached."""
        with self._lock:
            return self._since_s + self._timeout_s - self._clock.seconds()


@contextlib.contextmanager
def watching(config: WatchdogConfig, on_stall: Callable[[str], None]) -> Iterator[Watchdog]:
    """Yields a watchdog. Its thread writes the stacks and calls `on_stall(message)` if there is no progress in time.

    Args:
      config: the time limits.
      on_stall: called once, in the thread; it has to end the process.
    """
    watchdog = Watchdog(config)
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_LOOK_INTERVAL_S):
            if watchdog.seconds_left() <= 0:
                draw_no_more()
                # Not `sys.stderr`: if it was replaced, it may have no file descriptor.
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
                if (log := session_log.current()) is not None:
                    log.keep_stacks()
                message = f"no progress ({watchdog.describe()}); the stacks of this process are printed above"
                on_stall(message)
                return

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield watchdog
    finally:
        is_over.set()
