"""Which steps of a run are profiled: those that an option names, or the next ones after a request.

All processes of a run profile the same steps. They agree on them in threads, by the coordination service; no
collective operation is involved, and no step waits unless it is much shorter than the messages take.
"""

import dataclasses
import re
import threading
from typing import Any

import jax

from nfnet_flax.config import require
from nfnet_flax.parallel.processes import Processes

NUM_REQUESTED = 3
"""Number of steps that are profiled after a request."""
_MARGIN = 2
"""Number of steps that a process may still start before it waits for what the others say."""
_POLL_S = 10.0
_ANSWER_TIMEOUT_S = 60.0
_NEVER = 2**62


def parse_steps(text: str) -> range:
    """The steps that an option such as `100:103` names: 100, 101 and 102.

    Raises:
      ConfigError: the text is something else, or names no step.
    """
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    remedy = "give FIRST:END, such as 100:103 for the steps 100, 101 and 102"
    require(found is not None, "profile_steps", text, remedy)
    assert found is not None
    steps = range(int(found[1]), int(found[2]))
    require(len(steps) > 0 and steps.start >= 1, "profile_steps", text, f"has no step: steps count from 1; {remedy}")
    return steps


def checked_steps(steps: range) -> range:
    """The same steps.

    Raises:
      ConfigError: there is no step in the range, it does not begin at 1 or later, or it leaves out steps.
    """
    is_range = isinstance(steps, range) and steps.step == 1 and len(steps) > 0 and steps.start >= 1
    remedy = "give at least one step, counted from 1, such as range(100, 103) for the steps 100, 101 and 102"
    require(is_range, "profile_steps", steps, remedy)
    return steps


def described(steps: range) -> str:
    """Steps as text, such as `steps 100 to 102`."""
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def undisturbed(first: int, *, num_steps: int, eval_every_steps: int) -> range:
    """`NUM_REQUESTED` steps, the first of them `first` or shortly after it, so that no evaluation lies between them.

    An evaluation would make a trace many times larger, and hide the steps in it. Where evaluations are so frequent that
    it cannot be avoided, the steps begin at `first`. There are fewer steps at the end of the run, at last none.
    """
    begin = first
    if eval_every_steps > NUM_REQUESTED:
        # The trace begins when the step before is done, and an evaluation follows the step at which it is due.
        until_eval = -(begin - 1) % eval_every_steps
        if until_eval < NUM_REQUESTED:
            begin += until_eval + 1
    return range(begin, min(begin + NUM_REQUESTED, num_steps + 1))


@dataclasses.dataclass(frozen=True)
class Appointment:
    """Steps that all processes of a run are going to profile."""

    number: int
    """Counted over all profiles of a call of `train`, from 0."""
    steps: range
    reason: str
    """Who asked for it; empty: an option did."""


class Agreement:
    """The steps that are going to be profiled, which are the same in all processes of a run.

    Process 0 numbers the requests and passes them on. Then each process says after which step it will wait if it does
    not know by then what the others have said. The profile begins after the last of these steps: nobody is beyond it.
    """

    def __init__(
        self,
        processes: Processes,
        topic: str,
        *,
        start_step: int,
        num_steps: int,
        eval_every_steps: int,
        given: range | None,
    ) -> None:
        """Starts listening to process 0, unless this is process 0.

        Args:
          processes: the processes of this run.
          topic: beginning of the names of the messages; each can be used once.
          start_step: number of steps that were done before this start of the run.
          num_steps: number of steps of the whole run.
          eval_every_steps: interval of the evaluations.
          given: steps that an option names. Those that are done already are left out. None: there is no option.
        """
        self._processes = processes
        self._topic = topic
        self._num_steps = num_steps
        self._eval_every_steps = eval_every_steps
        self._first_step = start_step + 1
        self._changed = threading.Condition()
        self._step = start_step
        self._waits_at = _NEVER
        """Step after which this process waits for what the others say."""
        self._number = 0
        self._appointments: list[Appointment] = []
        self._is_over = False
        if given is not None and given[-1] > start_step:
            self._appointments.append(Appointment(0, range(max(given[0], start_step + 1), given.stop), ""))
            self._number = 1
        self._look_at = self._next()
        if not processes.is_first:
            threading.Thread(target=self._listen, name="profile", daemon=True).start()

    def passed(self, step: int) -> list[Appointment]:
        """The profiles that begin now. To be called after each step has been started, and once before the first."""
        # Without the lock: a thread that is about to agree first makes all later calls look, and then reads the step.
        self._step = step
        if step < self._look_at:
            return []
        with self._changed:
            if step >= self._waits_at:
                self._changed.wait_for(lambda: step < self._waits_at, _ANSWER_TIMEOUT_S)
            due = [each for each in self._appointments if step >= each.steps[0] - 1]
            self._appointments = [each for each in self._appointments if each not in due]
            self._look_at = self._next()
            return [each for each in due if step == each.steps[0] - 1]

    def is_pending(self) -> bool:
        """Whether a requested profile has not begun yet."""
        with self._changed:
            return any(each.reason for each in self._appointments)

    def request(self, reason: str) -> Appointment | None:
        """Agrees with all processes on the steps of a profile; None: the run ends before. For process 0, in a thread.

        Raises:
          jax.errors.JaxRuntimeError: a process does not answer.
        """
        if self._processes.count > 1:
            self.put(f"{self._number}/asked", reason)
        return self._agree(reason)

    def close(self) -> None:
        """Ends the thread."""
        self._is_over = True

    def put(self, key: str, value: Any) -> None:
        """Tells the other processes something about the profiles of this call of `train`."""
        self._processes.put(f"{self._topic}/{key}", value)

    def wait_for(self, key: str, timeout_s: float) -> Any:
        """What another process tells; raises `jax.errors.JaxRuntimeError` if that takes longer than the time."""
        return self._processes.wait_for(f"{self._topic}/{key}", timeout_s)

    def of_all(self, folder: str) -> dict[int, Any]:
        """Index of a process -> what it has told under `folder/INDEX`; empty in a run of one process."""
        return {} if self._processes.count == 1 else self._processes.of_all(f"{self._topic}/{folder}")

    def _listen(self) -> None:
        while not self._is_over:
            try:
                self._agree(self.wait_for(f"{self._number}/asked", _POLL_S))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # process 0 has ended, which `parallel.peers` also notices

    def _agree(self, reason: str) -> Appointment | None:
        with self._changed:
            self._look_at = 0  # before the step is read, see `passed`
            # The first step after a start also compiles, which is not what a request asks for.
            margin = 1 if self._processes.count == 1 else _MARGIN
            self._waits_at = waits_at = max(self._step + margin, self._first_step)
            self._look_at = self._next()
        number, last, found = self._number, waits_at, None
        try:
            if self._processes.count > 1:
                self.put(f"{number}/waits_at/{self._processes.index}", waits_at)
                keys = (f"{number}/waits_at/{index}" for index in range(self._processes.count))
                last = max(self.wait_for(key, _ANSWER_TIMEOUT_S) for key in keys)
            steps = undisturbed(last + 1, num_steps=self._num_steps, eval_every_steps=self._eval_every_steps)
            found = Appointment(number, steps, reason) if steps else None
        finally:
            with self._changed:
                self._appointments += [found] if found else []
                self._waits_at, self._number = _NEVER, number + 1
                self._look_at = self._next()
                self._changed.notify_all()
        return found

    def _next(self) -> int:
        """The first step after which `passed` has something to do."""
        return min([self._waits_at, *(each.steps[0] - 1 for each in self._appointments)])
