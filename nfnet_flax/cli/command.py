"""Which subcommand runs, and how its errors are reported."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from absl import logging

from nfnet_flax import streams
from nfnet_flax.cli import convert, doctor, models, plan, train
from nfnet_flax.cli import eval as evaluation
from nfnet_flax.cli.errors import explain
from nfnet_flax.cli.usage import USAGE
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STORAGE_FAILED
from nfnet_flax.output import OutputLost, guarded_output

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.run,
    "eval": evaluation.run,
    "models": models.run,
    "convert": convert.run,
    "plan": plan.run,
    "doctor": doctor.run,
}
_WRITE_FILES = (["train"], ["convert"])
"""What these make lies in files: they go on where nothing can be printed. The others have nothing but their output."""
_EXIT_NOT_READ = 128 + signal.SIGPIPE
"""What a shell gives for a command whose reader went away, as in `nfnet models | head`."""


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
    # It logs its errors with tracebacks and raises them, too; they are reported once.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    try:
        return _COMMANDS[argv[0]](argv[1:])
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        code, message = known
        print(f"nfnet: {message}", file=sys.stderr)
        if code == EXIT_STORAGE_FAILED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # threads that still write would be waited for, some of them for minutes
        return code
