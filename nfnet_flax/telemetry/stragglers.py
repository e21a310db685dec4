"""Which process of a run is slow, as far as the hosts' clocks show it.

Processes wait for one another in each step, so that all take the same time. What tells them apart is how long each
waited for its own images. They exchange this through the coordination service, at log steps: no device is involved, and
no process waits for another.
"""

import dataclasses
import socket
import statistics

from nfnet_flax.messages import warn
from nfnet_flax.parallel.processes import Processes

_FOLDER = "telemetry"
_SLOW_SHARE = 0.2
"""Share of the time that a process may wait for its images before it counts as slow."""
_NUM_LINES = 3
"""Number of log steps in a row at which the same process must be slow, to be named in a warning."""


@dataclasses.dataclass(frozen=True)
class Waited:
    """How long a process waited since its last log step."""

    host: str
    data_wait_s: float
    """Seconds spent waiting for the next batch."""
    whole_s: float
    """Seconds since the last log step."""


class Stragglers:
    """Exchanges and compares the waiting times of the processes of a run."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._host = socket.gethostname()
        self._slow_process: int | None = None
        self._num_lines = 0
        self._has_warned = False

    def share(self, data_wait_s: float, whole_s: float) -> None:
        """Tells the other processes how long this one waited; to be called in each process at each log step."""
        if self._processes.count > 1:
            found = Waited(self._host, data_wait_s, whole_s)
            self._processes.put(f"{_FOLDER}/{self._processes.index}", dataclasses.asdict(found))

    def metrics(self, step: int) -> dict[str, float]:
        """The newest times of the slowest and the fastest process; prints a warning if one is slow again and again.

        There are none in a run of one process, nor before each process has told its own.
        """
        if self._processes.count == 1:
            return {}
        found = {index: Waited(**value) for index, value in self._processes.of_all(_FOLDER).items()}
        if len(found) < self._processes.count:
            return {}
        slowest = max(found, key=lambda index: found[index].data_wait_s)
        fastest = min(found, key=lambda index: found[index].data_wait_s)
        self._notice(step, found, slowest)
        return {
            "processes/slowest_data_wait_s": found[slowest].data_wait_s,
            "processes/slowest_data_wait_process": float(slowest),
            "processes/fastest_data_wait_s": found[fastest].data_wait_s,
            "processes/fastest_data_wait_process": float(fastest),
            "processes/slowest_step_s": max(each.whole_s - each.data_wait_s for each in found.values()),
            "processes/fastest_step_s": min(each.whole_s - each.data_wait_s for each in found.values()),
        }

    def _notice(self, step: int, found: dict[int, Waited], slowest: int) -> None:
        of_others = statistics.median(each.data_wait_s for index, each in found.items() if index != slowest)
        own = found[slowest]
        is_slow = own.data_wait_s > _SLOW_SHARE * own.whole_s and own.data_wait_s > 2 * of_others
        self._num_lines = self._num_lines + 1 if is_slow and slowest == self._slow_process else int(is_slow)
        self._slow_process = slowest
        if self._num_lines >= _NUM_LINES and not self._has_warned:
            self._has_warned = True
            warn(
                f"process {slowest} on {own.host} is slow at preparing images: before step {step} it waited "
                f"{own.data_wait_s:.1f} of {own.whole_s:.1f} s for them, the others {of_others:.1f} s, and all "
                "processes wait for the slowest; look at the load and the disk of this host, or give it more threads "
                "or worker processes (--data.num-threads, --data.num-workers)"
            )
