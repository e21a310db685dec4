"""Profiles of a few steps of a running job, for XProf and the profile plugin of TensorBoard.

Each process traces itself by `jax.profiler` and puts its file into the same folder of the run; XProf shows all of them
together. While no profile is taken, a step costs one look at a number. A profile may fail in any way, and then the run
goes on with one warning.
"""

import contextlib
import dataclasses
import itertools
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from nfnet_flax.config import require
from nfnet_flax.messages import warn
from nfnet_flax.parallel.processes import Processes
from nfnet_flax.storage import Folder
from nfnet_flax.storage.scratch import scratch_folder
from nfnet_flax.telemetry.profile_requests import requests
from nfnet_flax.telemetry.profile_steps import Agreement, Appointment, checked_steps, described

_TRACE = "xplane.pb"
_MEMORY = "memory.pb.gz"
_CALLS = itertools.count()
_WRITE_TIMEOUT_S = 300.0
_ANSWER_TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """What is profiled in one call of `train`."""

    steps: range | None = None
    """Steps, counted from 1; None: only what is requested while the run trains."""
    signalled: threading.Event = dataclasses.field(default_factory=threading.Event)
    """To be set by the signal that requests a profile."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            checked_steps(self.steps)

    def check(self, num_steps: int) -> None:
        """Raises `ConfigError` if the run ends before the steps."""
        remedy = f"the run has only {num_steps} steps: name steps up to {num_steps}"
        require(self.steps is None or self.steps[-1] <= num_steps, "profile_steps", _as_option(self.steps), remedy)


def _as_option(steps: range | None) -> str:
    return "" if steps is None else f"{steps.start}:{steps.stop}"


@dataclasses.dataclass
class _Trace:
    """A trace that is on."""

    appointment: Appointment
    folder: Path
    """Where JAX writes it; deleted when `opened` is closed."""
    opened: contextlib.ExitStack
    marker: contextlib.ExitStack
    """Open while a step runs, which the trace then shows."""
    last_step: int
    """The last step that was traced so far."""


class Profiler:
    """Traces the steps that the processes have agreed on; made by `profiling`."""

    def __init__(
        self, agreement: Agreement, processes: Processes, place: Folder, folder: str, say: Callable[[str], None]
    ) -> None:
        self._agreement = agreement
        self._processes = processes
        self._place = place
        self._folder = folder
        self._say = say
        self._trace: _Trace | None = None
        self._writer: threading.Thread | None = None

    def step(self, step: int, metrics: Any = None) -> None:
        """To be called after each step has been started, with what it returns."""
        begins = self._agreement.passed(step)
        if begins or self._trace is not None:
            self._change(step, begins, metrics)

    def is_busy(self) -> bool:
        """Whether a profile is being taken or written, or a requested one has not begun yet."""
        is_writing = self._writer is not None and self._writer.is_alive()
        return self._trace is not None or is_writing or self._agreement.is_pending()

    def close(self) -> None:
        """Ends a trace that is on, and waits until it is written."""
        if self._agreement.is_pending():
            self._say("the run ends before the steps that were to be profiled")
        self._agreement.close()
        if self._trace is not None:
            self._finish(self._trace)
        self._wait()

    def _change(self, step: int, begins: list[Appointment], metrics: Any) -> None:
        trace = self._trace
        if trace is not None:
            trace.last_step = step
            if step < trace.appointment.steps[-1]:
                trace.marker.close()
                self._mark(trace, step + 1)
            else:
                jax.block_until_ready(metrics)
                self._finish(trace)
        for appointment in begins:
            if self._trace is None:
                jax.block_until_ready(metrics)  # so that earlier steps are not in the trace
                self._begin(appointment, step)
            else:
                self._say(f"{described(appointment.steps)} cannot be profiled, as a profile is being taken already")

    def _begin(self, appointment: Appointment, step: int) -> None:
        self._wait()
        if not appointment.reason:  # of a requested one it was said when the steps were agreed on
            self._say(f"profiling {described(appointment.steps)}")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python functions would make the trace larger and the steps slower
        with contextlib.ExitStack() as opened:
            try:
                folder = opened.enter_context(scratch_folder())
                jax.profiler.start_trace(folder, profiler_options=options)
            except Exception as error:  # another trace is on, the disk is full, or a library is missing
                problem = _brief(error)
                self._write_in_a_thread(lambda: self._miss(appointment, problem))
                return
            self._trace = _Trace(appointment, folder, opened.pop_all(), contextlib.ExitStack(), step)
        self._mark(self._trace, step + 1)

    def _mark(self, trace: _Trace, step: int) -> None:
        trace.marker.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def _finish(self, trace: _Trace) -> None:
        self._trace = None
        trace.marker.close()
        first = trace.appointment.steps[0]
        done = dataclasses.replace(trace.appointment, steps=range(first, max(first, trace.last_step) + 1))
        self._write_in_a_thread(lambda: self._write(trace, done))

    def _write_in_a_thread(self, write: Callable[[], None]) -> None:
        self._writer = threading.Thread(target=write, name="profile writer", daemon=True)
        self._writer.start()

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join(_WRITE_TIMEOUT_S)

    def _miss(self, appointment: Appointment, problem: str) -> None:
        """Reports that there is no trace of this process; the others may have theirs."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._report(appointment, self._announced_name(appointment) if self._processes.is_first else "", problem)

    def _write(self, trace: _Trace, appointment: Appointment) -> None:
        """Ends a trace and writes it; in a thread, as this takes seconds.

        Args:
          trace: the trace.
          appointment: with the steps that were traced.
        """
        name, problem = "", ""
        with trace.opened:
            try:
                name = self._announced_name(appointment) if self._processes.is_first else ""
                memory = jax.profiler.device_memory_profile()
                jax.profiler.stop_trace()
                name = name or self._agreement.wait_for(f"{appointment.number}/name", _ANSWER_TIMEOUT_S)
                (file,) = trace.folder.rglob(f"*.{_TRACE}")
                self._place.upload(file, f"{name}/{self._host()}.{_TRACE}")
                self._place.put(f"{name}/{self._host()}.{_MEMORY}", memory)
            except Exception as error:  # a full disk, a bucket that fails, or a trace that is too large
                problem = _brief(error)
                with contextlib.suppress(Exception):
                    jax.profiler.stop_trace()  # JAX holds a trace that it could not write
        self._report(appointment, name, problem)

    def _announced_name(self, appointment: Appointment) -> str:
        """The folder of a profile in that of the run, which process 0 chooses and tells the others."""
        first, last = appointment.steps[0], appointment.steps[-1]
        name = f"{self._folder}/{time.strftime('%Y_%m_%d_%H_%M_%S')}_steps_{first}_to_{last}"
        if self._processes.count > 1:
            self._agreement.put(f"{appointment.number}/name", name)
        return name

    def _host(self) -> str:
        """What XProf shows for a process: it takes the beginning of a file's name for a host."""
        host, count = socket.gethostname(), self._processes.count
        return host if count == 1 else f"{host}.process{self._processes.index:0{len(str(count - 1))}d}"

    def _report(self, appointment: Appointment, name: str, problem: str) -> None:
        """Process 0 says where the profile of all processes is, and what could not be written."""
        number = appointment.number
        if not self._processes.is_first:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._agreement.put(f"{number}/done/{self._processes.index}", problem)
            return
        problems = [problem]
        for index in range(1, self._processes.count):
            try:
                problems.append(self._agreement.wait_for(f"{number}/done/{index}", _ANSWER_TIMEOUT_S))
            except jax.errors.JaxRuntimeError:
                problems.append("it does not answer")
        failed = [index for index, each in enumerate(problems) if each]
        if failed:
            by = "" if self._processes.count == 1 else f" of process {', '.join(map(str, failed))}"
            why = problems[failed[0]]
            warn(f"the profile of {described(appointment.steps)}{by} is missing: {why}. The run goes on")
        if len(failed) < self._processes.count:
            logdir = shlex.quote(f"{self._place}/{self._folder.partition('/')[0]}")
            self._say(
                f"profile of {described(appointment.steps)}: {self._place}/{name}; to look at it: xprof --logdir "
                f"{logdir} (pip install 'nfnet_flax[profile]')"
            )


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def profiling(
    options: ProfileOptions,
    processes: Processes,
    place: Folder,
    folder: str,
    *,
    start_step: int,
    num_steps: int,
    eval_every_steps: int,
    say: Callable[[str], None],
    look_s: float,
) -> Iterator[Profiler]:
    """Yields what takes profiles of a run; within the context, they can be requested.

    Args:
      options: what is profiled.
      processes: the processes of the run.
      place: folder of the run.
      folder: name of the folder in it for the profiles.
      start_step: number of steps that were done before this start of the run.
      num_steps: number of steps of the whole run.
      eval_every_steps: interval of the evaluations.
      say: prints a line; in processes other than the first it should not.
      look_s: interval at which process 0 looks for the file that requests a profile, in seconds.
    """
    agreement = Agreement(
        processes,
        f"profile/{next(_CALLS)}",
        start_step=start_step,
        num_steps=num_steps,
        eval_every_steps=eval_every_steps,
        given=options.steps,
    )
    profiler = Profiler(agreement, processes, place, folder, say)
    if options.steps is not None and options.steps[-1] <= start_step:
        say(f"{described(options.steps)} are not profiled: they were done before this start")
    with requests(agreement, processes, place, options.signalled, profiler.is_busy, say, look_s=look_s):
        try:
            profiler.step(start_step)  # an option may name the very first step
            yield profiler
        finally:
            profiler.close()
