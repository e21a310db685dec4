"""Running a recipe file, with arguments."""

import contextlib
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.own_code import python_file, run_file, running
from nfnet_flax.recipe import Recipe

_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    types.NoneType: lambda text: {"none": None}[text.lower()],
    str: str,
}
"""Annotation of a parameter of `recipe()` -> function that converts a text to its value."""


def load_recipe(path: str | Path) -> Recipe:
    """Runs a recipe file and returns the result of its function `recipe()`.

    The file may import modules from its own folder, and may define networks, sources and objectives: it becomes a
    module with the name of the file.

    Args:
      path: path of the file, with arguments if there are any: `recipes/nfnet_imagenet.py:variant=f3` calls
        `recipe(variant="f3")`. Several arguments are separated by commas. A value is passed as text, unless the
        parameter is annotated with int, float, bool or one of them or None: then it is converted (`true`, `false`,
        `none`).

    Raises:
      ConfigError: there is no such file, it defines no `recipe`, it cannot be run, an argument is not of its
        parameter's type, or a value in it is invalid. The message names the file and the line.
    """
    given, arguments = _split_arguments(str(path))
    file = python_file("recipe file", given)
    with running("recipe file", file):
        function = vars(run_file(file)).get("recipe")
        if not callable(function):
            raise ConfigError("it defines no function recipe() that returns a Recipe")
        result = function(**_typed(function, arguments))
    if not isinstance(result, Recipe):
        raise ConfigError(f"recipe file {str(file)!r}: recipe() returned {type(result).__name__}, not a Recipe")
    return result


def _split_arguments(path: str) -> tuple[str, dict[str, str]]:
    file, colon, text = path.partition(".py:")
    if not colon:
        return path, {}
    arguments: dict[str, str] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if not name or not value or name in arguments:
            raise ConfigError(f"recipe {path!r}: {item!r} is not a name=value, such as variant=f3, or is given twice")
        arguments[name] = value
    return f"{file}.py", arguments


def _typed(function: Callable[..., Any], arguments: dict[str, str]) -> dict[str, Any]:
    """Arguments of a function, converted as its annotations say; text if an annotation is missing or not supported.

    Raises:
      ConfigError: the function has no such parameter, or its value is not of the annotated type.
    """
    parameters = inspect.signature(function).parameters
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # they use names that are imported only for type checkers
        hints = {}
    for name in arguments:
        if name not in parameters:
            raise ConfigError(f"its recipe() has no parameter {name!r}: it has {', '.join(parameters) or 'none'}")
    return {name: _value(name, text, hints.get(name, str)) for name, text in arguments.items()}


def _value(name: str, text: str, hint: Any) -> Any:
    """The value of a text for a parameter of a type; for a union, the first type to which the text can be converted."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = sorted(typing.get_args(hint) if is_union else (hint,), key=lambda kind: kind is str)
    for kind in kinds:
        if kind not in _PARSERS:
            return text
        with contextlib.suppress(ValueError, KeyError):
            return _PARSERS[kind](text)
    named = " or ".join("none" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise ConfigError(f"its recipe() takes {name} = {text!r}: expected {named}")
