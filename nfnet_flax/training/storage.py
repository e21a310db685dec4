"""Errors of the folder of a run: the disk is full, there is no permission, or the folder was removed."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed


@contextlib.contextmanager
def storage_errors(folder: Any, errors: type[Exception] = Exception) -> Iterator[None]:
    """Converts `errors` that are raised within the context to errors that name `folder`.

    Raises:
      StorageFailed: instead of the error, which is its cause. A `ConfigError` is not converted. Neither is an error of
        JAX, such as for waiting for a process that died, because it does not concern the folder.
    """
    try:
        yield
    except (ConfigError, StorageFailed, jax.errors.JaxRuntimeError):
        raise
    except errors as error:
        raise StorageFailed(f"{folder}: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """The first line of an error, without the details that TensorStore appends in brackets."""
    lines = str(error).strip().splitlines()
    text = re.sub(r" \[(source locations|tensorstore_spec|tensorstore spec)=?.*", "", lines[0]) if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def silence_abandoned_writes() -> None:
    """Suppresses tracebacks of abandoned writes, for the rest of the process.

    If one array of a checkpoint cannot be written, Orbax raises an error and closes its event loop. TensorStore then
    cannot report the other writes to that loop and prints a traceback for each of them: hundreds, which hide the one
    message that gives the reason.
    """
    otherwise = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        is_abandoned = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (is_abandoned and unraisable.object is None):
            otherwise(unraisable)

    sys.unraisablehook = hook
