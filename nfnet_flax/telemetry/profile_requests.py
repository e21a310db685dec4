"""Requests for a profile of a run: a signal to any of its processes, or a file in its folder."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from nfnet_flax.json_files import StorageFailed
from nfnet_flax.messages import warn
from nfnet_flax.parallel.processes import Processes
from nfnet_flax.storage import Folder
from nfnet_flax.telemetry.profile_steps import Agreement, described

REQUEST = "profile_now"
"""File in the folder of a run that asks for a profile; it is deleted when it is seen."""
SIGNAL = "SIGUSR2"
_LOOK_S = 1.0
_END_S = 5.0
_IGNORED = "a request for a profile is ignored, as one is being taken already"


class _Requests:
    """Looks for requests and passes them on: to process 0, which agrees on the steps with all processes."""

    def __init__(
        self, agreement: Agreement, processes: Processes, place: Folder, is_busy: Callable[[], bool], *, look_s: float
    ) -> None:
        self._agreement = agreement
        self._processes = processes
        self._place = place
        self._is_busy = is_busy
        self._looks_between = max(1, round(look_s / _LOOK_S))
        self._num_looks = 0
        self._num_wishes = 0
        self._seen: dict[int, int] = {}
        self._is_kept = False
        """Whether the file is one that was seen already, and could not be deleted."""

    def reason(self, *, is_signalled: bool) -> str | None:
        """What asks for a profile now; None: nothing, or process 0 has been told.

        Raises:
          jax.errors.JaxRuntimeError: process 0 cannot be reached.
        """
        if not self._processes.is_first:
            self._num_wishes += is_signalled
            if is_signalled:
                self._agreement.put(f"wished/{self._processes.index}", self._num_wishes)
            return None
        wishes = self._agreement.of_all("wished")
        signalled = [index for index, count in wishes.items() if count != self._seen.get(index)]
        self._seen = wishes
        if is_signalled or signalled:
            return f"{SIGNAL} to process {0 if is_signalled else signalled[0]}"
        self._num_looks += 1
        is_due = self._num_looks % self._looks_between == 0
        return REQUEST if is_due and self._is_file_there() else None

    def answer(self, reason: str, say: Callable[[str], None]) -> None:
        """Agrees on the steps of a profile, unless one is being taken.

        Raises:
          jax.errors.JaxRuntimeError: another process does not answer.
        """
        if self._is_busy():
            say(f"{_IGNORED} ({reason})")
            return
        found = self._agreement.request(reason)
        say(f"{described(found.steps)} will be profiled ({reason})" if found else f"the run ends before ({reason})")

    def _is_file_there(self) -> bool:
        try:
            self._place.read(REQUEST)
        except FileNotFoundError:
            self._is_kept = False
            return False
        except (OSError, StorageFailed):  # the run reports a folder that fails when it writes there
            return False
        if self._is_kept:
            return False
        try:
            self._place.delete([REQUEST])
        except (OSError, StorageFailed) as error:
            self._is_kept = True
            warn(f"{self._place}/{REQUEST} cannot be deleted: delete it before the next request ({error})")
        return True


@contextmanager
def requests(
    agreement: Agreement,
    processes: Processes,
    place: Folder,
    signalled: threading.Event,
    is_busy: Callable[[], bool],
    say: Callable[[str], None],
    *,
    look_s: float,
) -> Iterator[None]:
    """Within the context, a thread looks for requests.

    Args:
      agreement: is asked for a profile.
      processes: the processes of the run.
      place: folder of the run.
      signalled: is set by the signal to this process.
      is_busy: whether a profile is being taken or written in this process, so that requests are ignored.
      say: prints a line.
      look_s: interval at which process 0 looks for the file, in seconds.
    """
    is_over = threading.Event()
    found = _Requests(agreement, processes, place, is_busy, look_s=look_s)

    def look() -> None:
        while True:
            signalled.wait(_LOOK_S)
            if is_over.is_set():
                return
            is_signalled = signalled.is_set()
            signalled.clear()
            try:
                if reason := found.reason(is_signalled=is_signalled):
                    found.answer(reason, say)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # a process has ended, which `parallel.peers` also notices
                warn("no profile is taken: a process of the run does not answer")

    thread = threading.Thread(target=look, name="profile requests", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        signalled.set()
        thread.join(_END_S)  # not for ever: it may wait for another process
