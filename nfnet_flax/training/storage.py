"""The folder of a run failing under it: disk full, no permission, gone."""

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
    """Says of `errors` within the context that they happened to `folder`.

    Raises:
      StorageFailed: instead of the error, which is its cause. A `ConfigError` passes, and so does an error of JAX, as
        of waiting for a process that died: it says nothing about the folder.
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
    """Keeps the end of a write that nobody waits for any more from being printed, for the rest of the process.

    When one array of a checkpoint cannot be written, Orbax raises and closes its event loop. TensorStore then fails to
    report each of the other writes there, and prints a traceback: hundreds, around the one line that says why.
    """
    otherwise = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        is_abandoned = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (is_abandoned and unraisable.object is None):
            otherwise(unraisable)

    sys.unraisablehook = hook
