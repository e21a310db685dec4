"""The message and the exit code with which the command line reports an error.

The message is a sentence with the remedy. The traceback of an unexpected error goes to the log (`session_log`).
"""

import signal
import traceback

from nfnet_flax.config import ConfigError
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_BUG,
    EXIT_COPIES_DIFFER,
    EXIT_INPUT_FAILED,
    EXIT_LOST,
    EXIT_STORAGE_FAILED,
)
from nfnet_flax.messages import as_given
from nfnet_flax.needed import what_to_install
from nfnet_flax.session_log import place_of_traceback
from nfnet_flax.training.fingerprints import CopiesDiffer
from nfnet_flax.training.lease import LeaseLost
from nfnet_flax.training.storage import StorageFailed
from nfnet_flax.verbosity import is_verbose
from nfnet_flax.weights.hub import HubUnreachable

_MAX_ERROR_LENGTH = 300
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit code that a shell reports for a command that Ctrl-C ended."""


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error; keeps its traceback in a file, or prints it, if it may be needed.

    Any error is a bug unless it is known that the user, a disk, a device or another process caused it.
    """
    found = _explained(error)
    is_shown = is_verbose()
    if found is None:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_ERROR_LENGTH]
        found = EXIT_BUG, f"unexpected error (a bug, or in code of your own): {text}\nTraceback"
    code, message = found
    message, is_cut, _ = message.partition("\nTraceback")  # of another thread or process, which a sentence is not
    if is_cut:
        place = place_of_traceback(error)
        is_shown |= place is None
        message += "; its traceback is printed above" if place is None else f"; its traceback is in {place}"
    if is_shown:
        traceback.print_exception(error)
    return code, as_given(message)


def _explained(error: BaseException) -> tuple[int, str] | None:
    match error:
        case ConfigError():
            return EXIT_BAD_INPUT, f"error: {error}"
        case InputFailed():
            return EXIT_INPUT_FAILED, f"the input failed: {error}"
        case HubUnreachable():
            return EXIT_INPUT_FAILED, str(error)
        case StorageFailed():
            return EXIT_STORAGE_FAILED, f"the run's folder failed: {error}; run again once that is repaired"
        case LeaseLost():
            return EXIT_LOST, str(error)
        case CopiesDiffer():
            return EXIT_COPIES_DIFFER, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
        case ModuleNotFoundError() if (message := what_to_install(error)) is not None:
            return EXIT_BAD_INPUT, f"error: {message}"
    return None
