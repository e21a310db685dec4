"""Reads the options of a command by tyro, and what `--help` says of them."""

import dataclasses
import functools
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from nfnet_flax.config import Shown

T = TypeVar("T")

# Annotations of options: the words for their values.
DIR = tyro.conf.arg(metavar="DIR")
FILE = tyro.conf.arg(metavar="FILE")
WEIGHTS = tyro.conf.arg(metavar="FILE|FOLDER|NAME")
NAME = tyro.conf.arg(metavar="NAME")
COLUMN = tyro.conf.arg(metavar="COLUMN")
CHECKPOINT = tyro.conf.arg(metavar="{newest,best}|STEP")
COUNT = tyro.conf.arg(metavar="N")
COUNTS = tyro.conf.arg(metavar="N ...")
NAMES = tyro.conf.arg(metavar="NAME ...")
NUMBER = tyro.conf.arg(metavar="X")
PIXELS = tyro.conf.arg(metavar="PIXELS")
SECONDS = tyro.conf.arg(metavar="SECONDS")

_REGISTRY = ConstructorRegistry()


def parsed(kind: type[T], argv: Sequence[str], prog: str, description: str | None = None) -> T:
    """The options of a command; ends the process after help or a wrong option.

    Args:
      kind: dataclass of the options. Its docstring is the help, if there is no description.
      argv: the words of the command line.
      prog: name of the program in messages, such as `nfnet eval`.
      description: what the command does.
    """
    try:
        return tyro.cli(kind, args=argv, prog=prog, description=description, registry=_REGISTRY)
    except SystemExit as stopped:
        if stopped.code not in (None, 0) and (note := dash_note(argv)) is not None:
            print(f"nfnet: {note}", file=sys.stderr)
        raise


def dash_note(argv: Sequence[str]) -> str | None:
    """How to give the first word that is a file, but is read as an option; None if no word is."""
    word = next((word for word in argv if word.startswith("-") and len(word) > 1 and os.path.lexists(word)), None)
    return None if word is None else f"a file whose name begins with a dash is given as ./{word}"


class _Fields:
    """A rule for dataclasses: as tyro reads them, with the words that `Shown` gives, and help in whole paragraphs."""

    def __init__(self) -> None:
        self._is_asked = True

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if not self._is_asked or not dataclasses.is_dataclass(info.type):
            return None
        self._is_asked = False  # the rule of tyro is wanted now
        try:
            found = ConstructorRegistry.get_struct_spec(info)
        finally:
            self._is_asked = True
        if not isinstance(found, StructConstructorSpec):
            return None
        fields = (
            dataclasses.replace(field, type=_with_words(field.type), helptext=_in_paragraphs(field.helptext))
            for field in found.fields
        )
        return dataclasses.replace(found, fields=tuple(fields))


_REGISTRY.struct_rule(_Fields())


@_REGISTRY.primitive_rule
def _any_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    return _text("TEXT") if info.type is str else None


def _text(word: str) -> PrimitiveConstructorSpec[str]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=word,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


def _with_words(hint: Any) -> Any:
    """A type whose parts that are annotated with `Shown` are shown so by tyro."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        shown = [each.word for each in arguments[1:] if isinstance(each, Shown)]
        words = [_text(word) if arguments[0] is str else tyro.conf.arg(metavar=word) for word in shown]
        return Annotated[(_with_words(arguments[0]), *arguments[1:], *words)]
    if origin in (types.UnionType, typing.Union):
        return functools.reduce(operator.or_, map(_with_words, arguments))
    if origin is tuple:
        return types.GenericAlias(tuple, tuple(map(_with_words, arguments)))
    return hint


def _in_paragraphs(text: str | Callable[[], str | None] | None) -> str | Callable[[], str | None] | None:
    """A help text without the line breaks of the docstring that it is from; it is made when it is asked for."""
    if text is None:
        return None

    def joined() -> str | None:
        found = text() if callable(text) else text
        return None if found is None else re.sub(r"(?<!\n)\n(?!\n)", " ", found)

    return joined
