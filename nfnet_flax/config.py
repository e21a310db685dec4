"""Typed, frozen configuration, checked where a value is made. `config_json.py` has its JSON form.

Every configuration class of the package is a frozen dataclass whose `__post_init__` calls `check_types` first and then
checks its own fields with `require`, so a wrong value raises an error where it is written.
"""

import dataclasses
import difflib
import re
import types
import typing
from typing import Annotated, Any

MAX_COUNT = 2**31 - 1
"""Largest number of steps, rows, examples or classes: arrays hold them as 32-bit integers."""
MAX_IMAGE_PX = 65_500
"""Largest height or width of an image, in pixels: what a JPEG file can hold."""
_MAX_FLOAT = 3.4028234e38
"""Largest number of float32, in which nearly everything is computed."""
_MOST_LISTED = 10
"""Number of known names of which all are listed in place of an unknown one."""
_MAX_INT = 2**63 - 1
"""Largest integer that files and libraries can store: they use 64 bits."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """Annotation of a field, or of the text that it may hold: the word for its value in the help of commands."""

    word: str


File = Annotated[str, Shown("FILE")]
FileIfAny = Annotated[str | None, Shown("FILE")]
Folder = Annotated[str, Shown("DIR")]
Name = Annotated[str, Shown("NAME")]
Pattern = Annotated[str, Shown("PATTERN")]
Column = Annotated[str, Shown("COLUMN")]


class ConfigError(ValueError):
    """Something that the user gave and can correct. Commands print it without a traceback and end with exit code 2."""


def require(condition: bool, field: str, value: object, remedy: str) -> None:
    """Raises a `ConfigError` that names the field, its value and the remedy, unless `condition` is true."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: {remedy}")


def require_count(field: str, value: int, *, most: int = MAX_COUNT) -> None:
    """Raises `ConfigError` unless a number of things is at least 1 and at most `most`."""
    require(1 <= value <= most, field, value, f"must be at least 1 and at most {most:,}")


def require_one_of(field: str, value: object, known: typing.Collection[str]) -> None:
    """Raises `ConfigError` unless a value is one of the known names, so that no other value is taken for a default."""
    require(isinstance(value, str) and value in known, field, value, f"give one of {', '.join(map(repr, known))}")


def unknown_name(kind: str, name: str, known: typing.Iterable[str], *, listed_by: str = "") -> ConfigError:
    """The error for a name that is not in a table; its remedy lists the known names, of many only the most similar.

    Args:
      kind: what the name is of, such as `model`.
      name: the unknown name.
      known: the names in the table.
      listed_by: command that lists many of them, such as `nfnet models`; empty: there is none.
    """
    names = sorted(known, key=_with_numbers)
    near = nearest(name, names) if len(names) > _MOST_LISTED else []
    if near:
        where = f" ({listed_by} lists all)" if listed_by else ""
        return ConfigError(f"unknown {kind} {name!r}: known are {', '.join(near)}, ...{where}")
    if listed_by and len(names) > _MOST_LISTED:
        return ConfigError(f"unknown {kind} {name!r}: {listed_by} lists the known ones")
    return ConfigError(f"unknown {kind} {name!r}: known are {', '.join(names)}")


def _with_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts names that differ in a number by its size: b9 before b10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def nearest(name: str, known: typing.Iterable[str]) -> list[str]:
    """At most three known names that are spelt similarly to a name, the most similar first."""
    return difflib.get_close_matches(name, known, n=3, cutoff=0.5)


def _matches(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_matches, value, arguments))
    if hint in (int, float):  # Python takes a bool for an int, but in a recipe it is a mistake
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, types.NoneType if hint is None else hint)


def check_types(config: Any) -> None:
    """Raises `ConfigError` for the first field of a dataclass whose value is not of the annotated type or out of range.

    Every number must be finite and fit into float32 or 64 bits; "off" is written as None, not as infinity. Several
    values are given as a tuple, because lists, sets and dicts can be changed and have no hash.
    """
    for name, hint in field_hints(type(config)).items():
        value = getattr(config, name)
        if any((typing.get_origin(part) or part) in (list, set, dict) for part in members_of(hint)):
            raise ConfigError(
                f"{type(config).__name__}.{name}: is annotated as {text_of(hint)}: give a tuple, such as "
                "tuple[int, ...], as a configuration must not change"
            )
        if not _matches(value, hint):
            raise ConfigError(f"{type(config).__name__}.{name} = {value!r}: expected {text_of(hint)}")
        for number in value if isinstance(value, tuple) else (value,):
            _check_number(f"{type(config).__name__}.{name}", number)


def _check_number(field: str, value: object) -> None:
    if isinstance(value, float):
        require(
            abs(value) <= _MAX_FLOAT, field, value, f"must be finite, and at most {_MAX_FLOAT:.1e} in size (float32)"
        )
    elif isinstance(value, int):
        require(abs(value) <= _MAX_INT, field, value, "is beyond 64 bits: give a smaller number")


def field_hints(kind: type) -> dict[str, Any]:
    """Type of each field of a dataclass, in the order of its JSON form: its own fields, then those of its base classes.

    Raises:
      ConfigError: an annotation names something that is not imported.
    """
    try:
        hints = typing.get_type_hints(kind)
    except NameError as error:
        raise ConfigError(
            f"{kind.__name__}: {error} (in the annotation of a field): import it, not only for type checkers"
        ) from error
    mro = kind.__mro__

    def last_owner(field: "dataclasses.Field[Any]") -> int:
        return max(i for i, base in enumerate(mro) if field.name in vars(base).get("__dataclass_fields__", ()))

    return {field.name: hints[field.name] for field in sorted(dataclasses.fields(kind), key=last_owner)}


def members_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type that it is."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def text_of(hint: Any) -> str:
    """A type as it is written in code."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
