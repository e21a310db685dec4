"""The message and the exit code with which the command line reports an error."""

from nfnet_flax.config import ConfigError
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_COPIES_DIFFER,
    EXIT_INPUT_FAILED,
    EXIT_LOST,
    EXIT_STORAGE_FAILED,
)
from nfnet_flax.messages import as_given
from nfnet_flax.training.fingerprints import CopiesDiffer
from nfnet_flax.training.lease import LeaseLost
from nfnet_flax.training.storage import StorageFailed
from nfnet_flax.weights.hub import HubUnreachable


def explain(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of an error that the user, a disk, a device or another process caused; None for a bug."""
    found = _explained(error)
    return None if found is None else (found[0], as_given(found[1]))


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
    return None
