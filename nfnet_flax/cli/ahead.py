"""Options that are read before all others, because code that a recipe or a run names must be loaded first."""

from collections.abc import Iterator
from typing import Annotated

import tyro

from nfnet_flax.own_code import load_code

Code = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        metavar="FILE.py|MODULE",
        help="Your own code that the run or recipe names, such as a network or an objective. The option may be "
        "given several times. No other code is executed.",
    ),
]
"""Annotation of the field `code` of a command's options."""


def load_given_code(argv: list[str]) -> None:
    """Loads the code that the options `--code` name.

    Raises:
      ConfigError: there is no such code, or it cannot be run.
    """
    for code in values_of("--code", argv):
        load_code(code)


def values_of(option: str, argv: list[str]) -> Iterator[str]:
    """The value of an option, for each time that it is given."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name == option:
            yield value if equals else following
