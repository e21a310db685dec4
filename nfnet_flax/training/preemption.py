"""Being told to stop: SIGTERM and Ctrl-C set a flag that the loop reads between steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or SIGINT sets; a second one ends the process at once.

    Outside the main thread Python can install no handler; there the event is never set by a signal.
    """
    requested = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if requested.is_set():
            os._exit(128 + number)
        requested.set()

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
