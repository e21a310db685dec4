"""Which kind of work each second of a process was spent on."""

import contextlib
import functools
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
        self._events: EventLog | None = None
        self._step = 0
        self._outcome: tuple[Event, dict[str, str]] = ("failed", {})

    def enter(self, category: Category) -> None:
        """From now on, the time belongs to this category."""
        now = time.perf_counter()
        compiled_s = _compiled_s()[0]
        spent_s = now - self._since_s
        # Compilations are timed by JAX, some of them in other threads: they cannot have taken longer than the time.
        of_compiling_s = min(spent_s, compiled_s - self._compiled_s) if self._category != "compile" else 0.0
        self._totals["compile"] += of_compiling_s
        self._totals[self._category] += spent_s - of_compiling_s
        self._category, self._since_s, self._compiled_s = category, now, compiled_s

    def totals(self) -> dict[Category, float]:
        """Seconds of each category since the process began."""
        self.enter(self._category)
        return dict(self._totals)

    def record(self, event: Event, step: int, **facts: Any) -> None:
        """Writes a line with the time since the previous one into the run's record, if there is one."""
        self._step = step
        if self._events is None:
            return
        totals = self.totals()
        spent: dict[str, float] = {}
        spent |= {name: value - self._written[name] for name, value in totals.items() if value > self._written[name]}
        self._written = totals
        self._events.write(event, self._since_s + self._offset_s, step, spent, facts)

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
        try:
            yield
        except BaseException as error:
            self._outcome = ("failed", {"reason": f"{type(error).__name__}: {error}".splitlines()[0]})
            if isinstance(error, silent_after):
                self._close()
            raise
        finally:
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
