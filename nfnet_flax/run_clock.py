"""A clock for time limits that counts only the time during which this process ran."""

import threading
import time

_COUNTED_OF_A_GAP_S = 0.5
"""Seconds that are counted for a gap: not zero, so that a limit still ends on a machine where every reading is late."""


class RunClock:
    """Seconds during which this process ran, as far as the readings of the clock show.

    A process that is suspended (Ctrl-Z, `docker pause`, a debugger, the migration of a virtual machine) does nothing
    meanwhile, and must not be considered stuck when it continues. It is not notified of the suspension. But if the
    clock is read every second and a minute has passed since the last reading, the process was not running. So code that
    waits has to wait in short slices and read the clock after each. Several threads may share a clock.
    """

    def __init__(self, *, max_gap_s: float) -> None:
        """Starts at 0.

        Args:
          max_gap_s: a longer time between two readings, in seconds, is counted as almost nothing. Give several times
            the interval at which the clock is read, as threads of a busy process run late.
        """
        self._max_gap_s = max_gap_s
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._seconds = 0.0

    def seconds(self) -> float:
        """Time counted so far, in seconds; time is counted only when this is called."""
        with self._lock:
            now = time.monotonic()
            gap, self._last = now - self._last, now
            self._seconds += gap if gap <= self._max_gap_s else min(gap, _COUNTED_OF_A_GAP_S)
            return self._seconds
