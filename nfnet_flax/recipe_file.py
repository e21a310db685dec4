"""Running a recipe file, and saying where in it something is wrong."""

import contextlib
import dataclasses
import importlib.util
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError, nearest
from nfnet_flax.paths import local_path
from nfnet_flax.recipe import Recipe

_UNKNOWN_FIELD = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")

_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    types.NoneType: lambda text: {"none": None}[text.lower()],
    str: str,
}
"""By the annotation of a parameter of `recipe()`, what makes its value of a text."""


def load_recipe(path: str | Path) -> Recipe:
    """Runs a recipe file and returns what its `recipe()` makes. It may import modules that lie beside it.

    Args:
      path: of the file; `recipes/nfnet_imagenet.py:variant=f3` calls `recipe(variant="f3")`. Several arguments are
        separated by commas. Their values arrive as text, unless the parameter is annotated with int, float, bool or one
        of them or None: then as such (`true`, `false`, `none`).

    Raises:
      ConfigError: there is no such file, it defines no `recipe`, it cannot be run, an argument is not of its
        parameter's type, or a value in it is invalid. The message names the file and the line.
    """
    given, arguments = _split_arguments(str(path))
    file = local_path("recipe file", given)
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"recipe file {str(given)!r} does not exist or is not a .py file: give the path of a recipe")
    name = f"recipe_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up what their annotations name
    try:
        with _importable(file.parent):
            spec.loader.exec_module(module)
            function = vars(module).get("recipe")
            if not callable(function):
                raise ConfigError("it defines no function recipe() that returns a Recipe")
            result = function(**_typed(function, arguments))
    except Exception as error:
        raise ConfigError(f"recipe file {_location(file, error)}: {_explanation(error)}") from error
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
            raise ConfigError(f"recipe {path!r}: {item!r} is not a name=value of its own, such as variant=f3")
        arguments[name] = value
    return f"{file}.py", arguments


def _typed(function: Callable[..., Any], arguments: dict[str, str]) -> dict[str, Any]:
    """Arguments of a function as its annotations say; text where they say nothing that is known here.

    Raises:
      ConfigError: the function has no such parameter, or its value is not of the annotated type.
    """
    parameters = inspect.signature(function).parameters
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # they name what is imported for type checkers alone
        hints = {}
    for name in arguments:
        if name not in parameters:
            raise ConfigError(f"its recipe() has no parameter {name!r}: it has {', '.join(parameters) or 'none'}")
    return {name: _value(name, text, hints.get(name, str)) for name, text in arguments.items()}


def _value(name: str, text: str, hint: Any) -> Any:
    """What a text means for a parameter of a type: of several, the first that it can be."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = sorted(typing.get_args(hint) if is_union else (hint,), key=lambda kind: kind is str)
    for kind in kinds:
        if kind not in _PARSERS:
            return text
        with contextlib.suppress(ValueError, KeyError):
            return _PARSERS[kind](text)
    named = " or ".join("none" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise ConfigError(f"its recipe() takes {name} = {text!r}: expected {named}")


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets modules of a folder be imported, as those beside a script are."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the recipe has removed it
            sys.path.remove(str(folder))


def _location(file: Path, error: Exception) -> str:
    """The innermost line of the recipe, or of a module beside it, that led to an error."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename!r}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).parent == file.parent and frame.filename != __file__:
            return f"{frame.filename!r}, line {frame.lineno}"
    return repr(str(file))


def _explanation(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    unknown = _UNKNOWN_FIELD.search(str(error))
    kind = _imported(unknown.group(1)) if isinstance(error, TypeError) and unknown is not None else None
    if unknown is not None and kind is not None:
        moved = vars(kind).get("moved_fields", {})
        if unknown.group(2) in moved:
            field, part = moved[unknown.group(2)]
            return f"{text}: it is part of {field}={part}(...) now"
        fields = [field.name for field in dataclasses.fields(kind)]
        near = nearest(unknown.group(2), fields)
        question = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"{text}{question or '.'} Its fields are {', '.join(fields)}"
    return text


def _imported(class_name: str) -> type | None:
    """A configuration class that a recipe has imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("nfnet_flax.", "recipe_")):
            found = vars(module).get(class_name)
            if isinstance(found, type) and dataclasses.is_dataclass(found):
                return found
    return None
