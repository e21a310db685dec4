"""A clock for time limits: it counts only the time during which this process ran."""

import threading
import time

_COUNTED_OF_A_GAP_S = 0.5
"""What a gap counts for: not nothing, so that a limit still ends on a machine where every look is late."""


class RunClock:
    """Seconds during which this process ran, as far as those who read the clock can tell.

    A process that is suspended (Ctrl-Z, `docker pause`, a debugger, the migration of a virtual machine) does nothing
    meanwhile, and is not to be taken for stuck when it goes on. It is not told of it; but somebody who reads this clock
    every second and finds a minute gone since the last reading knows that it was not running. So the one who waits
    waits in short slices and reads the clock after each. Several threads may share a clock.
    """

    def __init__(self, *, max_gap_s: float) -> None:
        """Starts at 0.

        Args:
          max_gap_s: of a longer time between two readings, in seconds, next to nothing counts. Several times the slice
            in which the clock is read, as threads of a busy process run late.
        """
        self._max_gap_s = max_gap_s
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._seconds = 0.0

    def seconds(self) -> float:
        """Time counted so far; reading it is what makes it count."""
        with self._lock:
            now = time.monotonic()
            gap, self._last = now - self._last, now
            self._seconds += gap if gap <= self._max_gap_s else min(gap, _COUNTED_OF_A_GAP_S)
            return self._seconds
