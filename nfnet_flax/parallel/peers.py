"""Which processes are alive: every process reports every few seconds what it is doing, and reads the others' reports.

If a process dies, JAX's own heartbeats abort the others (exit code 134) and name only a number. The reports here are
noticed earlier, and name the process, its step and its phase. JAX's heartbeats remain active, and are needed if process
0 dies, which stores the reports.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from nfnet_flax.exit_codes import EXIT_LOST
from nfnet_flax.parallel.processes import Processes, leave
from nfnet_flax.run_clock import RunClock
from nfnet_flax.verbosity import stamp

BEAT_INTERVAL_S = 2.0
"""Interval at which each process reports what it is doing."""
_MAX_GAP_S = 5 * BEAT_INTERVAL_S
"""If the time between two readings is longer, this process itself did not run, so the others are not considered
silent."""
_SILENT_AFTER_S = 4 * BEAT_INTERVAL_S
"""After an error that a dead process may have caused, a process without a report for this time is considered dead."""
_ORDERLY_TIMEOUT_S = 60.0
"""Longest time that a process that is done waits for the others, which may still be writing."""
_FAILED_TIMEOUT_S = 6.0
"""Longest time that a process that failed waits until the others have read this and end, too."""


@dataclasses.dataclass
class _Heard:
    beat: Any
    at: float


class Peers:
    """Watches the other processes of a run, in a thread of its own."""

    def __init__(self, processes: Processes, *, heartbeat_timeout_s: float) -> None:
        """Starts watching, unless this is the only process of the run."""
        self._processes = processes
        self._timeout_s = heartbeat_timeout_s
        self._lock = threading.Lock()  # guards the reports, and the choice of the thread that ends this process
        self._clock = RunClock(max_gap_s=_MAX_GAP_S)
        self._heard = {index: _Heard(None, self._clock.seconds()) for index in range(processes.count)}
        self._is_leaving = False
        self.describe: Callable[[], str] = lambda: "starting"
        """Returns what this process is doing, for its reports; the caller replaces this function."""
        if processes.count > 1:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def positions(self) -> list[str]:
        """One line per process: what its last report says, and how old that report is."""
        with self._lock:
            now = self._clock.seconds()
            return [
                f"process {index}: {heard.beat[1] if heard.beat else 'no report yet'} ({now - heard.at:.0f} s ago)"
                for index, heard in self._heard.items()
            ]

    def leave(self, code: int) -> NoReturn:
        """Ends this process when the others end, too, each with its own exit code."""
        self._claim_the_end()
        leave(self._processes, code, timeout_s=_ORDERLY_TIMEOUT_S)

    def fail(self, code: int, reason: str) -> NoReturn:
        """Reports to the others why this process ends, and ends it.

        Args:
          code: exit code, with which the others end as well.
          reason: short text for the others' messages.
        """
        self._claim_the_end()
        if self._processes.count > 1:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._processes.put(f"failed/{self._processes.index}", [code, reason])
        leave(self._processes, code, timeout_s=_FAILED_TIMEOUT_S)

    def _claim_the_end(self) -> None:
        with self._lock:
            is_claimed, self._is_leaving = self._is_leaving, True
        if is_claimed:
            time.sleep(2 * _ORDERLY_TIMEOUT_S)  # another thread of this process is about to end it

    def fail_if_another_is_lost(self) -> None:
        """To be called after an error that the death of another process may have caused. Waits until such a death would
        be noticed; if there was one, names that process and ends this one, and returns otherwise."""
        if self._processes.count == 1:
            return
        deadline = time.monotonic() + _SILENT_AFTER_S + BEAT_INTERVAL_S
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if silent := self._silent(_SILENT_AFTER_S):
                self._lost(silent)

    def _silent(self, after_s: float) -> list[int]:
        with self._lock:
            now = self._clock.seconds()
            return [
                index
                for index, heard in self._heard.items()
                if index != self._processes.index and now - heard.at > after_s
            ]

    def _lost(self, silent: list[int]) -> NoReturn:
        names = " and ".join(f"process {index}" for index in silent)
        lines = "\n".join(f"  {line}" for line in self.positions())
        reason = f"{names} died or is frozen"
        print(f"{stamp()}nfnet: {reason}; last heard:\n{lines}", file=sys.stderr, flush=True)
        self.fail(EXIT_LOST, reason)

    def _watch(self) -> None:
        while True:
            try:
                self._processes.put(f"beat/{self._processes.index}", [time.monotonic(), self.describe()])
                beats, failed = self._processes.of_all("beat"), self._processes.of_all("failed")
            except jax.errors.JaxRuntimeError as error:
                # JAX will soon abort this process, so it ends itself with a message now.
                reason = "process 0, which all others depend on, cannot be reached: it died, or its network failed"
                print(f"{stamp()}nfnet: {reason} ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
                self.fail(EXIT_LOST, reason)
            with self._lock:
                for index, beat in beats.items():
                    if self._heard[index].beat is None or self._heard[index].beat[0] != beat[0]:
                        self._heard[index] = _Heard(beat, self._clock.seconds())
            for index, (code, reason) in failed.items():
                if index != self._processes.index:
                    print(f"{stamp()}nfnet: process {index} ended: {reason}", file=sys.stderr, flush=True)
                    self.fail(code, f"process {index} ended: {reason}")
            if silent := self._silent(self._timeout_s):
                self._lost(silent)
            time.sleep(BEAT_INTERVAL_S)
