"""Progress of what takes long: drawn where a person looks, in sparse lines elsewhere, and not at all in Python code.

Any code may track what it does (`tracking`, `track`); that costs next to nothing. It is only shown where the caller
wants it (`showing`), which is what commands do. It is shown on stderr; results are printed to stdout.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from nfnet_flax import output
from nfnet_flax.columns import one_line
from nfnet_flax.messages import as_given
from nfnet_flax.units import clock, human_size
from nfnet_flax.verbosity import is_quiet, is_verbose, stamp

T = TypeVar("T")

BYTES = "bytes"
"""Unit that is shown as KiB, MiB and so on."""
FIRST_LINE_S = 2.0
"""Time after which the first line is printed where nothing is drawn, in seconds."""
COMPUTING_LINE_S = 10.0
"""The same for computations, which begin with a compilation."""
_NEXT_LINE_S = 30.0
_DRAWN_AFTER_S = 1.0
"""What is done before is not drawn, and the library that draws is not imported for it."""
_LINES_INTERVAL_S = 0.5
_DRAWING_INTERVAL_S = 0.25


class Task:
    """Something that takes long. Several threads may advance it."""

    def __init__(self, text: str, total: int | None, unit: str, *, first_line_s: float | None, at_once: bool) -> None:
        self.text = as_given(text)
        """What is done, such as `scanning /data/train`."""
        self.total = total
        """How much there is to do, in `unit`; None: not known."""
        self.unit = unit
        """What is counted, in the plural, such as `images`; empty: nothing."""
        self.facts: tuple[str, ...] = ()
        """Short texts that are drawn below it, as many to a line as fit; never in lines."""
        self.done = 0
        """How much is done. It may be set by one thread, or advanced by several."""
        self.shown_after_s = 0.0 if at_once else _DRAWN_AFTER_S
        """Time after which it is drawn, in seconds."""
        self.next_line_s = first_line_s
        """Time since its begin at which the next line is printed, in seconds; None: never."""
        self.num_lines = 0
        """Number of lines that were printed."""
        self._began_s = time.monotonic()
        self._ends_s: float | None = None
        self._lock = threading.Lock()

    def advance(self, count: int = 1) -> None:
        """Adds to what is done. Better every hundred things than for each of a million."""
        with self._lock:
            self.done += count

    def expect(self, left_s: float) -> None:
        """Sets the remaining time, in seconds, if something better is known than the mean speed so far."""
        self._ends_s = time.monotonic() + left_s

    @property
    def seconds(self) -> float:
        """Time since its begin, in seconds."""
        return time.monotonic() - self._began_s

    @property
    def left_s(self) -> float | None:
        """Remaining time, in seconds; None: not known."""
        if self._ends_s is not None:
            return max(0.0, self._ends_s - time.monotonic())
        if self.total is None or not 0 < self.done <= self.total:
            return None
        return self.seconds * (self.total - self.done) / self.done

    def amount(self) -> str:
        """How much is done, and of how much, as text; empty if nothing is counted."""
        if not self.unit:
            return ""
        if self.unit == BYTES:
            return human_size(self.done) + (f" of {human_size(self.total)}" if self.total else "")
        return f"{self.done:,}" + (f" of {self.total:,}" if self.total else "") + f" {self.unit}"

    def rate(self) -> str:
        """Speed as text; empty if it is not known."""
        if not self.unit or not self.done:
            return ""
        per_s = self.done / max(self.seconds, 1e-9)
        return f"{human_size(per_s)}/s" if self.unit == BYTES else f"{per_s:,.{0 if per_s >= 10 else 1}f} {self.unit}/s"


class _Lines:
    """Prints a line for a task that is slow, and then one from time to time."""

    interval_s = _LINES_INTERVAL_S

    def show(self, tasks: list[Task]) -> None:
        for task in tasks:
            seconds = task.seconds
            if task.next_line_s is None or seconds < task.next_line_s:
                continue
            task.next_line_s = seconds + _NEXT_LINE_S
            task.num_lines += 1
            left_s = task.left_s
            about = f"{task.amount()} after" if task.amount() else "running for"
            self._print(task, f"{about} {clock(seconds)}" + (f", {clock(left_s)} left" if left_s is not None else ""))

    def end(self, task: Task, *, is_done: bool) -> None:
        if task.num_lines and is_done:
            amount = f" ({task.amount()})" if task.amount() else ""
            self._print(task, f"done after {clock(task.seconds)}{amount}")

    def _print(self, task: Task, text: str) -> None:
        sys.stderr.write(f"{stamp()}nfnet: {one_line(task.text)}: {text}\n")  # at once, as other threads print, too
        sys.stderr.flush()


class _Drawing:
    """Draws the tasks on the last lines of the terminal."""

    interval_s = _DRAWING_INTERVAL_S

    def __init__(self, region: output.Region) -> None:
        self._region = region

    def show(self, tasks: list[Task]) -> None:
        shown = [task for task in tasks if task.seconds >= task.shown_after_s]
        if not shown:
            self._region.erase()
            return
        from nfnet_flax import drawing  # imports `rich`

        self._region.draw(drawing.lines(shown, self._region.width, self._region.stream))

    def end(self, task: Task, *, is_done: bool) -> None:
        del task, is_done  # it is not there any more when the others are drawn next


class _Display:
    """Shows the tasks that are going on, in a thread of its own."""

    def __init__(self, style: _Lines | _Drawing) -> None:
        self._style = style
        self._tasks: list[Task] = []
        self._changed = threading.Condition()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def draws(self) -> bool:
        """Whether it draws."""
        return isinstance(self._style, _Drawing)

    def add(self, task: Task) -> None:
        """Shows a task from now on."""
        with self._changed:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def remove(self, task: Task, *, is_done: bool) -> None:
        """Shows a task no more."""
        with self._changed:
            if task not in self._tasks:  # what goes on in the background may end after this
                return
            self._tasks.remove(task)
            self._style.end(task, is_done=is_done)
            if not self._tasks:
                self._style.show([])

    def close(self) -> None:
        """Ends the thread."""
        self._is_over.set()
        with self._changed:
            self._tasks.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._is_over.is_set())
                self._style.show(self._tasks)  # not later: a task that has ended must not be drawn
            self._is_over.wait(self._style.interval_s)


_display: _Display | None = None


@contextlib.contextmanager
def showing() -> Iterator[None]:
    """Within the context, progress is shown on stderr, unless `-q` was given; stderr must be guarded (`output`).

    If the process shows progress already, this changes nothing.
    """
    if _display is not None or is_quiet():
        yield
        return
    with contextlib.ExitStack() as opened:
        is_drawn = output.can_draw() and not is_verbose()
        style = _Drawing(opened.enter_context(output.region())) if is_drawn else _Lines()
        display = _Display(style)
        opened.callback(display.close)
        opened.enter_context(_shown_by(display))
        yield


def hidden() -> contextlib.AbstractContextManager[None]:
    """Within the context, no progress is shown: for Python code that does not ask for it, and for all processes of a
    run but one."""
    return _shown_by(None)


@contextlib.contextmanager
def _shown_by(display: _Display | None) -> Iterator[None]:
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


def is_drawn() -> bool:
    """Whether progress is drawn on a terminal now."""
    return _display is not None and _display.draws


@contextlib.contextmanager
def tracking(
    text: str,
    total: int | None = None,
    unit: str = "",
    *,
    first_line_s: float | None = FIRST_LINE_S,
    at_once: bool = False,
) -> Iterator[Task]:
    """A task that lasts as long as the context, and is shown if the process shows progress.

    Args:
      text: what is done, such as `scanning /data/train`.
      total: how much there is to do; None: not known.
      unit: what is counted, in the plural; empty: nothing.
      first_line_s: time after which the first line is printed where nothing is drawn, in seconds; None: never.
      at_once: whether it is drawn from the beginning, and not only if it lasts.
    """
    task = Task(text, total, unit, first_line_s=first_line_s, at_once=at_once)
    display = _display
    if display is None:
        yield task
        return
    display.add(task)
    is_done = False
    try:
        yield task
        is_done = True
    finally:
        display.remove(task, is_done=is_done)


def track(
    items: Iterable[T],
    text: str,
    unit: str,
    total: int | None = None,
    *,
    first_line_s: float | None = FIRST_LINE_S,
) -> Iterator[T]:
    """The items, one after the other, with a task that advances by one for each; see `tracking`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with tracking(text, total, unit, first_line_s=first_line_s) as task:
        for item in items:
            yield item
            task.advance()
