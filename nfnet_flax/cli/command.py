"""Runs the subcommand that the command line names, and reports its errors."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import logging

from nfnet_flax import streams
from nfnet_flax.cli import agc, convert, doctor, export, models, plan, predict, probe, report, train
from nfnet_flax.cli import eval as evaluation
from nfnet_flax.cli import signal as signal_propagation
from nfnet_flax.cli.errors import explain
from nfnet_flax.cli.usage import USAGE
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STORAGE_FAILED
from nfnet_flax.output import OutputLost, guarded_output
from nfnet_flax.telemetry.tracking import is_any_stuck

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.run,
    "eval": evaluation.run,
    "predict": predict.run,
    "models": models.run,
    "convert": convert.run,
    "export": export.run,
    "plan": plan.run,
    "doctor": doctor.run,
    "probe": probe.run,
    "signal": signal_propagation.run,
    "report": report.run,
    "agc": agc.run,
}
_WRITE_FILES = (["train"], ["convert"], ["export"])
"""Commands whose results are files: they continue if nothing can be printed. The others only print."""
_EXIT_NOT_READ = 128 + signal.SIGPIPE
"""Exit code that a shell reports for a command whose output is no longer read, as in `nfnet models | head`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    streams.open_missing()
    try:
        with guarded_output(goes_on=argv[:1] in _WRITE_FILES and not {"-h", "--help"} & set(argv)):
            return _run(argv)
    except OutputLost as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return _EXIT_NOT_READ
        print(f"nfnet: error: {error} cannot be written ({error.__cause__})", file=sys.stderr)
        return EXIT_BAD_INPUT
    finally:
        streams.drop_unwritten()


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return EXIT_DONE if argv else EXIT_BAD_INPUT
    if argv[0] not in _COMMANDS:
        print(f"nfnet: unknown command {argv[0]!r}\n{USAGE}", end="", file=sys.stderr)
        return EXIT_BAD_INPUT
    logging.set_verbosity(logging.ERROR)  # Orbax's notices would break the progress line
    # Orbax both logs its errors with tracebacks and raises them; they shall be reported once.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    try:
        code = _COMMANDS[argv[0]](argv[1:])
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        code, message = known
        print(f"nfnet: {message}", file=sys.stderr)
        if code == EXIT_STORAGE_FAILED:
            _leave(code)  # a normal exit would wait for threads that still write, some of them for minutes
    if is_any_stuck():
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
