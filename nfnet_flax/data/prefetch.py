"""Batches are prepared ahead of the step: lanes (threads or worker processes) compute them, one consumer takes them.

A batch is a pure function of its step, so any lane may compute any step. If a lane dies, it is known which step it had
not delivered. Grain's own prefetching is not used because there a batch that failed is left out of the stream, a worker
that exits with code 0 is waited for forever, and a signal to the process group ends the workers before the main process
can save.
"""

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.output import draw_no_more
from nfnet_flax.run_clock import RunClock

Rows = dict[str, np.ndarray]
_CLOSE_TIMEOUT_S = 10.0
"""Longest time that closing waits for batches that are being computed."""
_LOOK_INTERVAL_S = 0.25
"""Length of the slices in which a batch is waited for, because `RunClock` must be read often."""


class InputFailed(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """A batch cannot be computed: a worker died or is stuck, or a file cannot be read. The message names the step."""


def explain(error: BaseException) -> str:
    """The text of an error for a message: the error, its notes, which say where it occurred, and the traceback."""
    first = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return f"{first}\n" + "".join(traceback.format_exception(error)).rstrip()


class Lane(Protocol):
    """Something that computes one batch at a time."""

    name: str
    """Name of the lane in messages, such as `input worker 1 (pid 4711)`."""

    def compute(self, step: int) -> Rows:
        """The batch of a step. A `ConfigError` or `InputFailed` is passed on unchanged; other errors are explained."""
        ...

    def dump_stacks(self) -> None:
        """Writes what the lane is doing to stderr."""
        ...

    def stop(self) -> None:
        """Makes a running `compute` end soon, if possible. Called from another thread."""
        ...

    def close(self) -> None:
        """Releases the resources of the lane. Called by the lane's own thread, at its end."""
        ...


class ThreadLane:
    """A lane that computes in the thread that calls it."""

    def __init__(self, index: int, compute: Callable[[int], Rows]) -> None:
        self.name = f"input thread {index}"
        self._compute = compute

    def compute(self, step: int) -> Rows:
        """The batch of a step."""
        return self._compute(step)

    def dump_stacks(self) -> None:
        """Writes the stacks of all threads of this process to stderr."""
        # Not `sys.stderr`: if it was replaced, it may have no file descriptor.
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

    def stop(self) -> None:
        """Does nothing: Python cannot end a thread."""

    def close(self) -> None:
        """Does nothing: there are no resources to release."""


class Batches(Iterator[Rows]):
    """The batches of consecutive steps, in order. It has to be closed, which the end of a `with` block does, too."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        steps: range,
        *,
        prefetch_batches: int,
        stall_timeout_s: float,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the lanes.

        Args:
          lanes: the lanes that compute; each gets a thread of its own.
          steps: consecutive steps whose batches are wanted.
          prefetch_batches: number of batches that may be ready or in preparation ahead of the consumer.
          stall_timeout_s: longest wait for one batch, in seconds; after it the input is considered stuck. Time in which
            this process is suspended does not count.
          on_close: called when this is closed.
        """
        self._lanes = lanes
        self._on_close = on_close
        self._stop_step = steps.stop
        self._prefetch_batches = prefetch_batches
        self._stall_timeout_s = stall_timeout_s
        self._condition = threading.Condition()  # guards everything below
        self._next_step = steps.start
        self._unclaimed_step = steps.start
        self._ready: dict[int, Rows] = {}
        self._owing: dict[int, Lane] = {}
        self._failure: Exception | None = None
        self._is_closed = False
        # Daemon threads, as a thread that is stuck must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=lane.name, daemon=True) for lane in lanes
        ]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> Rows:
        """The next batch.

        Raises:
          ConfigError: something is wrong with the data, such as an image that cannot be decoded.
          InputFailed: a lane died, raised or is stuck. The input cannot be used any more.
        """
        with self._condition:
            step = self._next_step
            if self._is_closed or step >= self._stop_step:
                raise StopIteration
            clock = RunClock(max_gap_s=8 * _LOOK_INTERVAL_S)
            while step not in self._ready and self._failure is None and clock.seconds() < self._stall_timeout_s:
                self._condition.wait(_LOOK_INTERVAL_S)
            if self._failure is None and step not in self._ready:
                self._failure = self._stalled(step)
            if self._failure is not None:
                raise self._failure
            self._next_step += 1
            self._condition.notify_all()
            return self._ready.pop(step)

    def close(self) -> None:
        """Ends the lanes and waits for them, unless they are stuck."""
        with self._condition:
            self._is_closed = True
            self._ready.clear()
            self._condition.notify_all()
        self._on_close()
        for lane in self._lanes:
            lane.stop()
        deadline = time.monotonic() + (_CLOSE_TIMEOUT_S if self._failure is None else 1.0)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, lane: Lane) -> None:
        try:
            while (step := self._claim(lane)) is not None:
                try:
                    rows = lane.compute(step)
                except (ConfigError, InputFailed) as error:
                    self._fail(error)
                    return
                except BaseException as error:  # also `sys.exit`, which would not be noticed in a thread
                    self._fail(InputFailed(f"{lane.name}, preparing the batch of step {step}: {explain(error)}"))
                    return
                with self._condition:
                    del self._owing[step]
                    if not self._is_closed:
                        self._ready[step] = rows
                    self._condition.notify_all()
        finally:
            lane.close()

    def _claim(self, lane: Lane) -> int | None:
        """Waits until another batch may be prepared, and returns the step that a lane computes next; None at the
        end."""

        def at_end() -> bool:
            return self._is_closed or self._failure is not None or self._unclaimed_step >= self._stop_step

        with self._condition:
            self._condition.wait_for(
                lambda: at_end() or self._unclaimed_step < self._next_step + self._prefetch_batches
            )
            if at_end():
                return None
            step = self._unclaimed_step
            self._unclaimed_step += 1
            self._owing[step] = lane
            return step

    def _fail(self, error: Exception) -> None:
        with self._condition:
            if self._failure is None and not self._is_closed:
                self._failure = error
            self._condition.notify_all()

    def _stalled(self, step: int) -> InputFailed:
        # Some lane is computing this step: steps are claimed in order, and the batch is not ready.
        lane = self._owing[step]
        draw_no_more()
        print(f"no batch within {self._stall_timeout_s:g} s; stacks of {lane.name}:", file=sys.__stderr__, flush=True)
        lane.dump_stacks()
        return InputFailed(
            f"{lane.name} is stuck: it has not delivered the batch of step {step} within "
            f"data.stall_timeout_s = {self._stall_timeout_s:g} s; its stacks are printed above"
        )
