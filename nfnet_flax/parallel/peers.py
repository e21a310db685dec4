"""Who is still there: every process says every few seconds what it is doing, and hears of the others.

JAX's own heartbeats end a process with an abort (exit code 134) and name a number. These say which process, in which
step and phase, and come first; JAX's remain behind them, and are what is left when process 0, their hub, dies.
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

BEAT_INTERVAL_S = 2.0
"""How often each process says what it is doing."""
_MAX_GAP_S = 5 * BEAT_INTERVAL_S
"""A longer time between two looks is one in which this process itself did not run: nobody was silent meanwhile."""
_SILENT_AFTER_S = 4 * BEAT_INTERVAL_S
"""After an error that a dead process may have caused, one that was not heard of for so long is taken for dead."""
_ORDERLY_TIMEOUT_S = 60.0
"""How long a process that is done waits for the others, which may still be writing."""
_FAILED_TIMEOUT_S = 6.0
"""How long a process that failed waits for the others to hear of it and leave, too."""


@dataclasses.dataclass
class _Heard:
    beat: Any
    at: float


class Peers:
    """Watches the other processes of a run from a thread of its own."""

    def __init__(self, processes: Processes, *, heartbeat_timeout_s: float) -> None:
        """Starts watching, unless this process is by itself."""
        self._processes = processes
        self._timeout_s = heartbeat_timeout_s
        self._lock = threading.Lock()  # guards the table of what was heard, and who is the one to leave
        self._clock = RunClock(max_gap_s=_MAX_GAP_S)
        self._heard = {index: _Heard(None, self._clock.seconds()) for index in range(processes.count)}
        self._is_leaving = False
        self.describe: Callable[[], str] = lambda: "starting"
        """What this process is doing, for the others; replaced by who knows better."""
        if processes.count > 1:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def positions(self) -> list[str]:
        """One line per process: what it was doing when it was last heard of."""
        with self._lock:
            now = self._clock.seconds()
            return [
                f"process {index}: {heard.beat[1] if heard.beat else 'not heard of'} ({now - heard.at:.0f} s ago)"
                for index, heard in self._heard.items()
            ]

    def leave(self, code: int) -> NoReturn:
        """Ends this process together with the others, which end as well, each with a code of its own."""
        self._claim_the_end()
        leave(self._processes, code, timeout_s=_ORDERLY_TIMEOUT_S)

    def fail(self, code: int, reason: str) -> NoReturn:
        """Tells the others why this process ends, and ends it.

        Args:
          code: exit code, which the others end with as well.
          reason: in a few words.
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
        """After an error that the death of another process may have caused: waits until that would be known, and then
        names that process and ends this one; returns if all others are alive."""
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
        print(f"nfnet: {reason}; last heard:\n{lines}", file=sys.stderr, flush=True)
        self.fail(EXIT_LOST, reason)

    def _watch(self) -> None:
        while True:
            try:
                self._processes.put(f"beat/{self._processes.index}", [time.monotonic(), self.describe()])
                beats, failed = self._processes.of_all("beat"), self._processes.of_all("failed")
            except jax.errors.JaxRuntimeError as error:
                # JAX ends this process in a moment, if it has not yet.
                reason = "process 0, which all others depend on, cannot be reached: it died or its network did"
                print(f"nfnet: {reason} ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
                self.fail(EXIT_LOST, reason)
            with self._lock:
                for index, beat in beats.items():
                    if self._heard[index].beat is None or self._heard[index].beat[0] != beat[0]:
                        self._heard[index] = _Heard(beat, self._clock.seconds())
            for index, (code, reason) in failed.items():
                if index != self._processes.index:
                    print(f"nfnet: process {index} ended: {reason}", file=sys.stderr, flush=True)
                    self.fail(code, f"process {index} ended: {reason}")
            if silent := self._silent(self._timeout_s):
                self._lost(silent)
            time.sleep(BEAT_INTERVAL_S)
