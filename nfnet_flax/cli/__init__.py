"""The `nfnet` command: one file per subcommand, `command.py` decides which.

All of these files need packages that the networks do not need. If one is missing, the command says so.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from nfnet_flax.exit_codes import EXIT_BAD_INPUT
from nfnet_flax.garbage import collect_rarely
from nfnet_flax.needed import what_to_install


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of `nfnet`, which is `sys.argv` by default; returns the exit code.

    The process goes on, so notebooks and other programs can call this.
    """
    try:
        from nfnet_flax.cli import command
    except ModuleNotFoundError as error:
        return _missing(error)
    return command.main(argv)


def program() -> NoReturn:
    """The program `nfnet`: runs its command line and ends the process."""
    collect_rarely()
    try:
        from nfnet_flax.cli import command
    except ModuleNotFoundError as error:
        sys.exit(_missing(error))
    command.program()


def _missing(error: ModuleNotFoundError) -> int:
    message = what_to_install(error)
    if message is None:
        raise error
    print(f"nfnet: error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT
