"""Reads that were begun before their results are asked for."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

from nfnet_flax.storage.background import BackgroundThreads

_NUM_READERS = 32
"""Number of reads at the same time."""


class Ahead:
    """Reads that were begun, by what was read. It may be pickled, and is empty then."""

    def __init__(self) -> None:
        self._futures: defaultdict[Hashable, deque[Future[bytes]]] = defaultdict(deque)
        self._threads = BackgroundThreads(_NUM_READERS, "reading ahead")
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Ahead"], tuple[()]]:
        return Ahead, ()

    def begin(self, key: Hashable, read: Callable[..., bytes], *arguments: Any) -> None:
        """Begins a read; the result is kept until `take` returns it."""
        future = self._threads.submit(read, *arguments)
        with self._lock:
            self._futures[key].append(future)

    def take(self, key: Hashable) -> Future[bytes] | None:
        """A read that was begun, if there is one; the same one is not returned again."""
        with self._lock:
            waiting = self._futures.get(key)
            if not waiting:
                return None
            future = waiting.popleft()
            if not waiting:
                del self._futures[key]
            return future

    def clear(self) -> None:
        """Forgets the reads that nobody has taken."""
        with self._lock:
            futures = [future for waiting in self._futures.values() for future in waiting]
            self._futures.clear()
        for future in futures:
            future.cancel()
