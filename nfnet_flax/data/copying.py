"""Copies the shards of a set in the background, by several threads and perhaps several processes."""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from nfnet_flax.config import ConfigError
from nfnet_flax.messages import warn
from nfnet_flax.progress import tracking
from nfnet_flax.storage.cache import Outcome

_NUM_THREADS = 4
"""Number of shards that a process copies at the same time."""
LOOK_S = 0.2
"""Time between looks at a copy that another process makes, in seconds."""
_PAUSE_S = 30.0
"""Time until copying begins again after the store or the disk failed, in seconds."""
_ORDER_LENGTH = 20_000
"""Number of examples from which the order of copying is taken."""


class Shards(Protocol):
    """What is copied; see `BucketShards`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...

    def fetch(self, shard: str) -> Outcome: ...

    def fail(self, message: str) -> None: ...

    def no_room(self) -> str: ...


class Copying:
    """Shards that are being copied."""

    def __init__(self, shards: Shards, order: Iterable[str]) -> None:
        self._shards = shards
        self._order = order
        self._left: deque[str] | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._said_s = -_PAUSE_S
        self._shown = contextlib.ExitStack()

    def start(self) -> None:
        """Starts the threads. Their progress is drawn; where it is not, nothing is printed, as nobody waits for it."""
        shown = tracking("copying shards in the background", len(self._shards), "shards", first_line_s=None)
        self._task = self._shown.enter_context(shown)
        for index in range(_NUM_THREADS):
            threading.Thread(target=self._run, name=f"copying shards {index}", daemon=True).start()

    def stop(self) -> None:
        """Ends it once the shards that were begun are there; does not wait for that."""
        self._end.set()
        self._shown.close()

    def _run(self) -> None:
        """Copies shards until all are there, there is no room, or one of them has been replaced."""
        while not self._end.is_set() and (shard := self._next()) is not None:
            try:
                outcome = self._shards.fetch(shard)
            except ConfigError as error:
                self._end.set()
                self._shards.fail(str(error))
            except OSError as error:
                self._say_failing(error)
                self._again(shard)
                self._end.wait(_PAUSE_S)
            else:
                if outcome == "no room" and not self._end.is_set():
                    self._end.set()
                    warn(f"{shard} and others are read from the bucket, which is slower: {self._shards.no_room()}")
                elif outcome == "busy":
                    self._again(shard)
                    self._end.wait(LOOK_S)
                else:
                    self._task.advance()
        self._shown.close()

    def _next(self) -> str | None:
        with self._lock:
            if self._left is None:
                self._left = deque(self._in_order())
            return self._left.popleft() if self._left else None

    def _in_order(self) -> list[str]:
        """The shards that are wanted first, then, if the order is long, all others."""
        found = dict[str, None]()
        names = iter(self._order)
        for shard in itertools.islice(names, _ORDER_LENGTH):
            found[shard] = None
            if len(found) == len(self._shards):
                return list(found)
        return list(found) if next(names, None) is None else list(found | dict.fromkeys(self._shards))

    def _again(self, shard: str) -> None:
        with self._lock:
            assert self._left is not None
            self._left.append(shard)

    def _say_failing(self, error: OSError) -> None:
        with self._lock:
            is_new = time.monotonic() > self._said_s + _PAUSE_S
            self._said_s = time.monotonic() if is_new else self._said_s
        if is_new:
            warn(f"shards cannot be copied ({error}): they are read from the bucket until that passes")
