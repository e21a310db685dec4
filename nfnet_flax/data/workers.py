"""Worker processes of the input: each receives the number of a step over a socket and returns the batch of that step.

Batches are sent through a socket rather than shared memory, so nothing can remain in /dev/shm, whichever process is
killed. Workers are plain child programs rather than those of `multiprocessing`: so a script that trains needs no
`__main__` guard, and the signals that stop a run are blocked in the workers from their first instruction on.
"""

import contextlib
import faulthandler
import io
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.prefetch import InputFailed, Rows, explain
from nfnet_flax.own_code import find_modules_in, loaded_files

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask the main process to stop: from a scheduler, Ctrl-C, Slurm, a lost terminal. They are often sent to
all processes of a job."""
_DUMP_SIGNAL = signal.SIGUSR2
"""Signal at which a worker writes its stacks."""
_EXIT_TIMEOUT_S = 5.0
"""Longest time that a worker that closed its socket may take to end."""
_DUMP_S = 1.0
"""Time that a stuck worker gets to write its stacks."""


class BatchTable(Protocol):
    """Batches by step."""

    def __getitem__(self, step: int) -> Rows: ...


class WorkerProcess:
    """A lane whose child process computes one batch at a time."""

    def __init__(self, index: int, make_batches: Callable[[], BatchTable]) -> None:
        """Starts the process; `make_batches` is called at the first request.

        Args:
          index: number of the worker, for messages.
          make_batches: picklable function that returns the table of batches; called once, in the worker.
        """
        self._make_batches = make_batches
        self._is_ready = False
        self._socket, theirs = socket.socketpair()
        # The child inherits the mask, so a signal to the process group cannot end it before the main process has saved.
        # A signal that arrives here while the mask is set is delivered when the mask is restored.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from nfnet_flax.data.workers import serve; serve({theirs.fileno()})"],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=_environment(os.environ),
            )
        except OSError as error:
            self._socket.close()
            raise InputFailed(f"input worker {index} cannot be started: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self._stream = self._socket.makefile("rwb")
        self.name = f"input worker {index} (pid {self._process.pid})"

    def compute(self, step: int) -> Rows:
        """The batch of a step.

        Raises:
          ConfigError: raised by the worker, such as for an image that cannot be decoded; or the code that makes the
            batches is defined in the main program, from which a worker cannot import it.
          InputFailed: the worker ended, or raised another error.
        """
        try:
            if not self._is_ready:  # here and not in the constructor, as it waits until the worker listens
                _send(self._stream, (loaded_files(), _pickled(self._make_batches)))
                self._is_ready = True
            _send(self._stream, step)
            answer = pickle.load(self._stream)
            if isinstance(answer, dict):
                return {name: _receive_array(self._stream, *header) for name, header in answer.items()}
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            ended = self._how_it_ended()
            raise InputFailed(f"{self.name} {ended}; it had not delivered the batch of step {step}") from error
        kind, text = answer
        if issubclass(kind, ConfigError):
            raise kind(text)
        raise InputFailed(f"{self.name}, preparing the batch of step {step}: {text}")

    def dump_stacks(self) -> None:
        """Makes the worker write its stacks to stderr, if it is still able to."""
        self._process.send_signal(_DUMP_SIGNAL)
        time.sleep(_DUMP_S)

    def stop(self) -> None:
        """Kills the worker: it has nothing to save."""
        self._process.kill()

    def close(self) -> None:
        """Kills the worker and waits for its end."""
        self._process.kill()
        self._how_it_ended()
        with contextlib.suppress(OSError):  # a request that the worker no longer reads
            self._stream.close()
        self._socket.close()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "closed its connection but still runs"
        if code >= 0:
            return f"exited with code {code}"
        number = signal.Signals(-code)
        hint = " (by the system, if it ran out of memory)" if number == signal.SIGKILL else ""
        return f"was killed by {number.name}{hint}"


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    # The parent's import path, so that both run the same code. Grain imports JAX, which must not look for devices.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**environment, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> None:
        """Refuses classes and functions of the main program, which a worker would look for in its own program."""
        if isinstance(value, type | types.FunctionType) and value.__module__ == "__main__":
            raise ConfigError(
                f"data.num_workers: {value.__qualname__} is defined in the program that runs, where worker processes "
                "cannot import it: move it to a file of its own, or give data.num_workers = 0"
            )


def _pickled(value: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(value)
    return written.getvalue()


def _send(stream: Any, message: Any) -> None:
    pickle.dump(message, stream)
    stream.flush()


def _receive_array(stream: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, dtype)
    if stream.readinto(array.data.cast("B")) != array.nbytes:
        raise EOFError
    return array


def serve(descriptor: int) -> None:
    """The worker's program: answers requests on a socket until the socket is closed.

    The first message contains the files of users' code that the main process has loaded, by the names of the modules,
    and a pickled function that makes the table of batches. Every other message is a step. The answer is a dict of
    (dtype, shape), followed by the arrays' bytes, or the (class, text) of an error, after which the worker ends.
    """
    faulthandler.register(_DUMP_SIGNAL, all_threads=True)
    stream = socket.socket(fileno=descriptor).makefile("rwb")
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        # The socket is closed when the main process ends for any reason; then this process ends, whatever it is doing.
        try:
            while True:
                requests.put(pickle.load(stream))
        finally:
            os._exit(0)

    threading.Thread(target=listen, name="requests", daemon=True).start()
    with contextlib.suppress(ConnectionError):  # the main process has ended, and this one is about to end
        try:
            files, make_batches = requests.get()
            find_modules_in(files)
            batches = pickle.loads(make_batches)()
        except Exception as error:
            _send(stream, _as_answer(error))
            return
        while True:
            try:
                rows = batches[requests.get()]
            except Exception as error:
                _send(stream, _as_answer(error))
                return
            _send_rows(stream, rows)


def _send_rows(stream: Any, rows: Rows) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in rows.items()}
    _send(stream, {name: (array.dtype.str, array.shape) for name, array in arrays.items()})
    for array in arrays.values():
        stream.write(array.data.cast("B"))
    stream.flush()


def _as_answer(error: Exception) -> tuple[type[Exception], str]:
    if isinstance(error, ConfigError):
        return type(error), str(error)
    return InputFailed, explain(error)
