"""Runs the subcommand that the command line names, and reports its errors."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from logging import LogRecord
from typing import NoReturn

from absl import logging

from nfnet_flax import python_parser, runtime, session_log, streams
from nfnet_flax.cli import agc, claim, convert, doctor, export, models, plan, predict, probe, recipes, report, train
from nfnet_flax.cli import eval as evaluation
from nfnet_flax.cli import signal as signal_propagation
from nfnet_flax.cli.ahead import values_of
from nfnet_flax.cli.errors import explain
from nfnet_flax.cli.usage import USAGE, VERBOSITY
from nfnet_flax.config import unknown_name
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STORAGE_FAILED
from nfnet_flax.messages import Advice, NotesToStderr, advising
from nfnet_flax.output import OutputLost, guarded_output
from nfnet_flax.progress import hidden, showing
from nfnet_flax.telemetry.tracking import is_any_stuck
from nfnet_flax.verbosity import Level, is_verbose, printing, stamp

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.run,
    "eval": evaluation.run,
    "predict": predict.run,
    "models": models.run,
    "recipes": recipes.run,
    "convert": convert.run,
    "export": export.run,
    "plan": plan.run,
    "doctor": doctor.run,
    "probe": probe.run,
    "signal": signal_propagation.run,
    "report": report.run,
    "agc": agc.run,
    "claim": claim.run,
}
_WRITE_FILES = (["train"], ["convert"], ["export"], ["claim"])
"""Commands whose results are files: they continue if nothing can be printed. The others only print."""
_HAS_ALL_FIELDS = ("train", "plan")
"""Commands that have an option for every field of a recipe."""
_TOPICS = {"eval": ("data",)}
"""Command -> the parts of a recipe for whose fields it has options; the others have none."""
_WORDS = {"probe": probe.WORDS}
"""Command -> its own words for options of `nfnet train`."""
_LEVELS: dict[str, Level] = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
_HELP = {"-h", "--help"}
_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
"""Variables with the number of a process of a run, before it has joined the others."""
_EXIT_NOT_READ = 128 + signal.SIGPIPE
"""Exit code that a shell reports for a command whose output is no longer read, as in `nfnet models | head`."""


def program() -> NoReturn:
    """The program `nfnet`: runs its command line and ends the process, at once where threads would be waited for.

    A failed store has threads that still write, some of them for minutes, and a tracker may never be ready; Python
    waits for both at a normal end.
    """
    _end_on_signals_as_process_1()
    code = main()
    if code == EXIT_STORAGE_FAILED or is_any_stuck():
        os._exit(code)  # `main` has written what was printed
    sys.exit(code)


def _end_on_signals_as_process_1() -> None:
    """Gives signals their usual effect also where the program is process 1, as in a container.

    The kernel drops a signal to process 1 for which there is no handler; the container would be killed only after the
    time that it was given to stop. While a run trains, `training.preemption` handles them.
    """
    if os.getpid() == 1:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda received, _: os._exit(128 + received))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of `nfnet`, which is `sys.argv` by default; returns the exit code.

    The process goes on, so notebooks and other programs can call this.
    """
    argv, level = _level_of(list(sys.argv[1:] if argv is None else argv))
    streams.open_missing()
    python_parser.protect()
    try:
        with (
            printing(level),
            guarded_output(goes_on=argv[:1] in _WRITE_FILES and not _HELP & set(argv)),
            session_log.keeping() if argv[:1] == ["train"] else contextlib.nullcontext(),
        ):
            return _run(argv)
    except OutputLost as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return _EXIT_NOT_READ
        print(f"nfnet: error: {error} cannot be written ({error.__cause__})", file=sys.stderr)
        return EXIT_BAD_INPUT
    finally:
        streams.drop_unwritten()


def _level_of(argv: list[str]) -> tuple[list[str], Level]:
    """The command line without `-q` and `-v`, which may stand anywhere before `--`; the last of them counts."""
    end = argv.index("--") if "--" in argv else len(argv)
    levels = [_LEVELS[word] for word in argv[:end] if word in _LEVELS]
    return [word for word in argv[:end] if word not in _LEVELS] + argv[end:], (levels or ["normal"])[-1]


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in _HELP:
        print(USAGE, end="")
        return EXIT_DONE if argv else EXIT_BAD_INPUT
    if argv[0] == "--version":
        print(", ".join(f"{name} {version}" for name, version in runtime.versions().items()))
        return EXIT_DONE
    if argv[0] not in _COMMANDS:
        error = unknown_name("command", argv[0], _COMMANDS, listed_by="nfnet --help")
        print(f"nfnet: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    _choose_notes()
    with advising(_advice_of(argv[0])):
        return _reported(argv)


def _advice_of(name: str) -> Advice | None:
    if name in _HAS_ALL_FIELDS:
        return None
    return Advice(command=f"nfnet {name}", topics=_TOPICS.get(name, ()), words=_WORDS.get(name, {}))


def _reported(argv: list[str]) -> int:
    """Exit code of a command, whose errors are printed."""
    try:
        with showing() if _is_first(argv) else hidden(), _help_on_verbosity(argv):
            code = _COMMANDS[argv[0]](argv[1:])
    except OutputLost:
        raise
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error)
        print(f"{stamp()}nfnet: {message}", file=sys.stderr)
    return code


def _choose_notes() -> None:
    """Chooses which notes of the libraries are printed."""
    logger = logging.get_absl_logger()
    if is_verbose():
        logging.set_verbosity(logging.INFO)
        logger.removeFilter(_is_not_of_orbax)
        logger.handlers, logger.propagate = [NotesToStderr()], False
    else:
        logging.set_verbosity(logging.ERROR)
        logger.addFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: LogRecord) -> bool:
    """Orbax both logs its errors with tracebacks and raises them; they shall be reported once."""
    return "orbax" not in record.pathname


def _is_first(argv: list[str]) -> bool:
    """Whether this is the only process of a run or the first, as far as that is known before it joins the others."""
    if argv[0] != "train":
        return True
    given = [*values_of("--distributed.process-id", argv), *(os.environ[name] for name in _RANKS if name in os.environ)]
    return not given or given[0] == "0"


@contextlib.contextmanager
def _help_on_verbosity(argv: list[str]) -> Iterator[None]:
    """Adds the options that all commands have to the help that a command prints."""
    is_help = bool(_HELP & set(argv))
    try:
        yield
    except SystemExit as stopped:
        is_help &= stopped.code in (None, 0)
        raise
    finally:
        if is_help:
            print(VERBOSITY)
