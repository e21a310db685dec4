"""Running a recipe file, with arguments; recipes that come with the package have a name, too."""

import ast
import contextlib
import inspect
import re
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
_NAME = re.compile(r"\w+")
"""A name of a recipe, which no path of a `.py` file is."""


def load_recipe(path: str | Path) -> Recipe:
    """Runs a recipe file and returns the result of its function `recipe()`.

    The file may import modules from its own folder, and may define networks, sources and objectives: it becomes a
    module with the name of the file.

    Args:
      path: path of the file, with arguments if there are any: `recipes/nfnet_imagenet.py:variant=f3` calls
        `recipe(variant="f3")`. Several arguments are separated by commas; a comma that no `name=` follows is a part of
        the value before it. A value is passed as text, unless the parameter is annotated with int, float, bool or one
        of them or None: then it is converted (`true`, `false`, `none`). A recipe that comes with the package may be
        given by its name alone, as `digits` or `nfnet_imagenet:variant=f3`.

    Raises:
      ConfigError: there is no such file or name, it defines no `recipe`, it cannot be run, an argument is not of its
        parameter's type, or a value in it is invalid. The message names the file and the line.
    """
    given, arguments = _split_arguments(str(path))
    file = _named_file(given) or python_file("recipe file", given)
    with running("recipe file", file):
        function = vars(run_file(file)).get("recipe")
        if not callable(function):
            raise ConfigError("it defines no function recipe() that returns a Recipe")
        typed = _typed(function, arguments)
        _check_complete(function, typed, given)
        result = function(**typed)
    if not isinstance(result, Recipe):
        raise ConfigError(f"recipe file {str(file)!r}: recipe() returned {type(result).__name__}, not a Recipe")
    return result


def recipe_files() -> dict[str, Path]:
    """The recipes that come with the package: name -> file."""
    package = Path(__file__).parent
    # A wheel has them inside the package, a checkout beside it.
    folder = next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def about(file: Path) -> str:
    """The first line of the docstring of a recipe file, which is not run."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def _named_file(given: str) -> Path | None:
    """The file of a recipe that is given by its name; None: a path is given.

    Raises:
      ConfigError: it looks like a name, and no recipe of the package has it.
    """
    if not _NAME.fullmatch(given):
        return None
    files = recipe_files()
    if given not in files:
        raise ConfigError(
            f"recipe {given!r}: there is no such file, and no recipe of that name: give the path of a .py "
            f"file, or one of {', '.join(files)} (nfnet recipes lists them)"
        )
    return files[given]


def _split_arguments(path: str) -> tuple[str, dict[str, str]]:
    file, colon, text = path.partition(".py:")
    name, separator, named_text = path.partition(":")
    if not colon and separator and _NAME.fullmatch(name):
        return name, _arguments(path, named_text)
    return (f"{file}.py", _arguments(path, text)) if colon else (path, {})


def _arguments(path: str, text: str) -> dict[str, str]:
    arguments: dict[str, str] = {}
    for item in re.split(r",(?=\w+=)", text):  # a comma in a value, such as a folder's name, separates nothing
        name, _, value = item.partition("=")
        if not name or not value or name in arguments:
            raise ConfigError(f"recipe {path!r}: {item!r} is not a name=value, such as variant=f3, or is given twice")
        arguments[name] = value
    return arguments


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


def _check_complete(function: Callable[..., Any], arguments: dict[str, Any], given: str) -> None:
    """Raises `ConfigError` if a parameter has neither a value nor a default."""
    needed = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if missing := [name for name in needed if name not in arguments]:
        example = ",".join(f"{name}={arguments.get(name, '...')}" for name in needed)
        raise ConfigError(f"its recipe() needs values for {' and '.join(missing)}: give {given}:{example}")


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
