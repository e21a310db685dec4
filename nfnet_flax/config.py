"""Typed, frozen configuration: checks where a value is made, and a lossless JSON form.

Every configuration class of the package is a frozen dataclass whose `__post_init__` calls `check_types` first and then
its own `require`s, so a wrong value never travels further than the line that wrote it.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any

MAX_COUNT = 2**31 - 1
"""Largest number of steps, rows, examples or classes: arrays hold them as 32-bit integers."""
MAX_IMAGE_PX = 65_500
"""Largest height or width of an image, in pixels: what a JPEG file can hold."""
_MAX_FLOAT = 3.4028234e38
"""What float32 holds, in which nearly everything is computed."""
_MAX_INT = 2**63 - 1
"""What files and libraries hold."""


class ConfigError(ValueError):
    """Something the user gave and can mend. The command line prints it without a traceback and exits with code 2."""


def require(condition: bool, field: str, value: object, remedy: str) -> None:
    """Raises `ConfigError` naming the field, its value and the remedy unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: {remedy}")


def require_count(field: str, value: int, *, most: int = MAX_COUNT) -> None:
    """Raises `ConfigError` unless a number of things is at least 1 and at most `most`."""
    require(1 <= value <= most, field, value, f"must be at least 1 and at most {most:,}")


def require_one_of(field: str, value: object, known: typing.Collection[str]) -> None:
    """Raises `ConfigError` unless a value is one of a few names, so that none is taken for another by default."""
    require(isinstance(value, str) and value in known, field, value, f"give one of {', '.join(map(repr, known))}")


def unknown_name(kind: str, name: str, known: typing.Iterable[str]) -> ConfigError:
    """The error for a name outside a table, with the nearest known names as the remedy."""
    names = sorted(known)
    near = nearest(name, names)
    return ConfigError(f"unknown {kind} {name!r}: known are {', '.join(near or names)}{', ...' if near else ''}")


def nearest(name: str, known: typing.Iterable[str]) -> list[str]:
    """At most three of the known names that are spelt like a name, the likeliest first."""
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
    if hint in (int, float):  # bool is an int to Python and a mistake to a reader of a recipe
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, types.NoneType if hint is None else hint)


def check_types(config: Any) -> None:
    """Raises `ConfigError` for the first field of a dataclass whose value is not of the annotated type, or no number.

    Every number is finite, and not beyond what computes with it: no infinity stands for "off", which is None.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _matches(value, hint):
            raise ConfigError(f"{type(config).__name__}.{name} = {value!r}: expected {_text_of(hint)}")
        for number in value if isinstance(value, tuple) else (value,):
            _check_number(f"{type(config).__name__}.{name}", number)


def _check_number(field: str, value: object) -> None:
    if isinstance(value, float):
        require(
            abs(value) <= _MAX_FLOAT, field, value, f"must be finite, and at most {_MAX_FLOAT:.1e} in size (float32)"
        )
    elif isinstance(value, int):
        require(abs(value) <= _MAX_INT, field, value, "is beyond 64 bits: give a smaller number")


def _text_of(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def to_json(config: Any) -> Any:
    """A dataclass as plain dicts, lists and scalars; each dataclass carries its class name under `"type"`."""
    if dataclasses.is_dataclass(config):
        fields = {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    return [to_json(item) for item in config] if isinstance(config, tuple) else config


def from_json(hint: Any, data: Any, path: str = "") -> Any:
    """The inverse of `to_json` for a value annotated with `hint`.

    Raises:
      ConfigError: a field is unknown or missing (another version of the package wrote it), or its value is invalid.
    """
    if isinstance(data, list):
        arguments = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        item_hints = [arguments[0]] * len(data) if variadic else arguments
        if len(item_hints) != len(data):
            raise ConfigError(f"{path or 'recipe'} = {data!r}: expected {_text_of(hint)}")
        return tuple(from_json(item_hint, item, path) for item_hint, item in zip(item_hints, data, strict=True))
    if not isinstance(data, dict):
        return data
    options: Any = typing.get_args(hint) or (hint,)
    candidates: dict[str, Any] = {option.__name__: option for option in options if isinstance(option, type)}
    kind = data.get("type")
    if not isinstance(kind, str) or kind not in candidates:
        raise ConfigError(f"{path or 'recipe'}: unknown type {kind!r}: expected one of {sorted(candidates)}")
    cls = candidates[kind]
    hints = typing.get_type_hints(cls)
    given = {name: value for name, value in data.items() if name != "type"}
    if unequal := hints.keys() ^ given.keys():
        raise ConfigError(
            f"{path or 'recipe'}: fields {sorted(unequal)} are unknown or missing: "
            "it was written by another version of nfnet_flax; use that version"
        )
    return cls(**{name: from_json(hints[name], value, f"{path}.{name}".lstrip(".")) for name, value in given.items()})


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line per field in which two `to_json` trees differ: `optim.clipping: 0.01 -> 0.02`."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        names = [*old, *(name for name in new if name not in old)]
        missing = "(absent)"
        return [
            line
            for name in names
            for line in differences(old.get(name, missing), new.get(name, missing), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
