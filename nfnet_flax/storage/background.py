"""Threads that do not keep a process from ending, whatever they wait for."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_Calls = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class BackgroundThreads:
    """Calls functions in threads. Those of `concurrent.futures` are waited for when Python ends: a request that is
    repeated for two minutes would delay the end of a run that has saved and must go."""

    def __init__(self, num_threads: int, name: str) -> None:
        """Starts the threads when they are needed."""
        self._num_threads = num_threads
        self._name = name
        self._calls: _Calls = queue.SimpleQueue()
        self._num_started = 0
        self._lock = threading.Lock()

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Calls a function in one of the threads."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: call(*args, **kwargs)))
        with self._lock:
            if self._num_started < self._num_threads:
                self._num_started += 1
                # The thread knows nothing of this object: it ends when nobody needs the object any more.
                threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True).start()
                weakref.finalize(self, self._calls.put, None).atexit = False
        return future


def _serve(calls: _Calls) -> None:
    while (job := calls.get()) is not None:
        future, call = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del job, future, call  # a thread that waits must not keep a result in memory
