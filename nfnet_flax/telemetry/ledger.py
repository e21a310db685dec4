"""Which kind of work each second of a process was spent on."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from nfnet_flax.telemetry.events import Event, EventLog

Category = Literal["start", "restore", "compile", "step", "input", "evaluation", "save", "end"]
"""`start`: imports, connecting, opening the data; `restore`: making or reading the state; `input`: waiting for the next
batch; `save`: handing over a checkpoint, which is written in the background; `end`: waiting for what is still being
written. Compilations count as `compile`, wherever they happen."""
CATEGORIES: tuple[Category, ...] = get_args(Category)
LONGEST_SILENCE_S = 10.0
"""Time after which a line is written although nothing has happened, in seconds: a kill loses no more than this."""
_COMPILATIONS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Ledger:
    """Adds up the time of a process by category; the times of all categories add up to the time since it began."""

    def __init__(self, began_s: float) -> None:
        """Starts with the category `start`.

        Args:
          began_s: when the process began, by `time.perf_counter`.
        """
        now = time.perf_counter()
        self._offset_s = time.time() - now
        """Time since 1970 minus `time.perf_counter`. It is not looked up again: clocks are set while a process runs."""
        self.began_at_s = began_s + self._offset_s
        """When the process began, in seconds since 1970."""
        self._category: Category = "start"
        self._since_s = began_s
        self._compiled_s = _compiled_s()[0]
        self._totals: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
        self._written = dict(self._totals)
        self._written_s = now
        self._events: EventLog | None = None
        self._step = 0
        self._lock = threading.RLock()
        self._outcome: tuple[Event, dict[str, str]] = ("failed", {})

    def enter(self, category: Category, step: int | None = None) -> None:
        """From now on, the time belongs to this category.

        Args:
          category: what is done.
          step: number of updates done; None: as before.
        """
        with self._lock:
            now = time.perf_counter()
            compiled_s = _compiled_s()[0]
            spent_s = now - self._since_s
            # Compilations are timed by JAX, some of them in other threads: they cannot have taken longer than the time.
            of_compiling_s = min(spent_s, compiled_s - self._compiled_s) if self._category != "compile" else 0.0
            self._totals["compile"] += of_compiling_s
            self._totals[self._category] += spent_s - of_compiling_s
            self._category, self._since_s, self._compiled_s = category, now, compiled_s
            self._step = self._step if step is None else step

    def totals(self) -> dict[Category, float]:
        """Seconds of each category since the process began."""
        with self._lock:
            self.enter(self._category)
            return dict(self._totals)

    def record(self, event: Event, step: int, **facts: Any) -> None:
        """Writes a line with the time since the previous one into the run's record, if there is one."""
        with self._lock:
            self._step = step
            if self._events is None:
                return
            totals = self.totals()
            spent: dict[str, float] = {}
            spent |= {name: each - self._written[name] for name, each in totals.items() if each > self._written[name]}
            self._written = totals
            self._written_s = self._since_s
            self._events.write(event, self._since_s + self._offset_s, step, spent, facts)

    def _record_often(self, ended: threading.Event) -> None:
        """Writes a line whenever none has been written for a while. Runs in a thread."""
        while not ended.wait(LONGEST_SILENCE_S / 4):
            with self._lock:
                if time.perf_counter() - self._written_s >= LONGEST_SILENCE_S and not ended.is_set():
                    self.record("interval", self._step)

    def ends(self, event: Event, **facts: str) -> None:
        """Tells how the session ends, if nothing fails until then; `facts` are further entries of its last line."""
        self._outcome = (event, facts)

    @contextlib.contextmanager
    def recording(self, path: Path, silent_after: type[BaseException], **facts: Any) -> Iterator[None]:
        """Within the context, events are written to a file, beginning with `start`, and at last how the session ended.

        Args:
          path: the file.
          silent_after: an error after which nothing more is written, because the file belongs to another process.
          facts: further entries of the first line.
        """
        self._events = EventLog(path)
        self.record("start", 0, began_at_s=round(self.began_at_s, 3), **facts)
        ended = threading.Event()
        threading.Thread(target=self._record_often, args=(ended,), name="record of times", daemon=True).start()
        try:
            yield
        except BaseException as error:
            self._outcome = ("failed", {"reason": f"{type(error).__name__}: {error}".splitlines()[0]})
            if isinstance(error, silent_after):
                with self._lock:
                    self._close()
            raise
        finally:
            with self._lock:
                ended.set()
                event, how = self._outcome
                self.record(event, self._step, **how)
                self._close()

    def _close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


@functools.cache
def _compiled_s() -> list[float]:
    """A list with the seconds that this process has spent on compiling, from now on."""
    seconds = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILATIONS:
            seconds[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds
