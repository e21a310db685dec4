"""Sends the checkpoints of a run to its bucket, in a thread of their own, while the run trains on."""

import functools
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nfnet_flax.messages import warn
from nfnet_flax.training.layout import CHECKPOINT_KINDS
from nfnet_flax.training.mirror import Mirror
from nfnet_flax.training.storage import StorageFailed

_POLL_S = 0.05
_RECORDS_INTERVAL_S = 30.0
"""Interval at which metrics and curves are sent, in seconds."""


class Publisher:
    """Sends checkpoints one after the other; records go before each of them, and every half minute."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._is_abandoned = threading.Event()
        # In turn with checkpoints, so that an old one is never deleted before its successor counts.
        for kind in CHECKPOINT_KINDS:
            self._work.put(functools.partial(mirror.clean, kind))
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, kind: str, step: int) -> None:
        """Sends a checkpoint as soon as Orbax has completed it."""
        self._work.put(functools.partial(self._send, kind, step))

    def check(self) -> None:
        """Raises the error of an earlier checkpoint, if there was one, without waiting."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Waits until all checkpoints are sent; raises the error of one of them, if there was one."""
        self._work.join()
        self.check()

    def close(self, *, is_ok: bool) -> None:
        """Ends the thread when everything is sent, the last records included.

        Args:
          is_ok: whether the run goes well. Otherwise a checkpoint that Orbax has not completed is not waited for, and
            the records are sent if that succeeds: they show why the run ended.
        """
        if not is_ok:
            self._is_abandoned.set()
        self._work.put(None)
        self._thread.join()
        if is_ok:
            self.check()
            self._mirror.push()
        elif self._error is None:
            self._try(self._mirror.push)

    def _run(self) -> None:
        while True:
            try:
                item = self._work.get(timeout=_RECORDS_INTERVAL_S)
            except queue.Empty:
                self._push_records()
                continue
            try:
                if item is None:
                    return
                if self._error is None:
                    self._try(item)
            finally:
                self._work.task_done()

    def _push_records(self) -> None:
        if self._error is None:
            try:
                self._mirror.push()
            except StorageFailed as error:  # the next checkpoint needs it, and reports it if it still fails
                warn(f"metrics could not be sent: {error}")
            except BaseException as error:  # as in `_try`
                self._error = error

    def _send(self, kind: str, step: int) -> None:
        if _is_there(self._mirror.path / kind / str(step), self._is_abandoned):
            self._mirror.push()
            self._mirror.commit(kind, step)
            self._mirror.clean(kind)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # raised again by `check` in the thread that trains
            self._error = error


def _is_there(checkpoint: Path, is_abandoned: threading.Event) -> bool:
    """Waits until Orbax gives a checkpoint its final name; False if the run ends before."""
    while not checkpoint.exists():
        if is_abandoned.is_set():
            return False
        time.sleep(_POLL_S)
    return True
