"""The JSON form of configurations: it loses nothing, and reading it runs no code that it names."""

import dataclasses
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nfnet_flax.config import ConfigError, field_hints, members_of, nearest, text_of
from nfnet_flax.open_config import OpenConfig, is_own, kinds_of, type_name

ADDED_LATER: Mapping[str, bool] = MappingProxyType({"added_later": True})
"""`metadata` of a field that earlier versions did not have. Its default means what those versions did, so the default
is not written, and JSON without the field is read as the default."""


class CodeNotLoaded(ConfigError):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """A file that is read names a class of a user's own code that is not loaded."""


def to_json(config: Any, *, places: bool = True) -> Any:
    """A dataclass as plain dicts, lists and scalars; each dataclass carries the name of its class under `"type"`.

    Args:
      config: a configuration.
      places: whether the `place_fields` of its parts are included.

    Raises:
      ConfigError: a value has no JSON form.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        left_out = () if places or not isinstance(config, OpenConfig) else config.place_fields
        given = {name: getattr(config, name) for name in field_hints(type(config))}
        fields = {
            name: to_json(value, places=places)
            for name, value in given.items()
            if name not in left_out and not _is_default(config, name, value)
        }
        return {"type": type_name(type(config)), **fields}
    if isinstance(config, tuple):
        return [to_json(item, places=places) for item in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ConfigError(f"{config!r} cannot be stored: a field holds numbers, text, None, tuples or other dataclasses")


def _is_default(config: Any, name: str, value: object) -> bool:
    """Whether a field that earlier versions did not have is at its default, which means what those versions did."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return "added_later" in field.metadata and value == field.default


def from_json(hint: Any, data: Any, path: str = "") -> Any:
    """The inverse of `to_json` for a value annotated with `hint`.

    A class is found by its name in the package's tables or among the classes that are loaded already: nothing is
    imported, whatever the data say.

    Raises:
      CodeNotLoaded: a class of a user's own code is named that is not loaded.
      ConfigError: a field is unknown or missing (another version of the class wrote it), or its value is invalid.
    """
    if isinstance(data, list):
        return _tuple_from_json(hint, data, path)
    if not isinstance(data, dict):
        return data
    where = path or "recipe"
    options = [option for option in members_of(hint) if isinstance(option, type)]
    kinds = {name: kind for option in options for name, kind in kinds_of(option).items()}
    name = data.get("type")
    if not isinstance(name, str) or name not in kinds:
        if isinstance(name, str) and ":" in name and any(issubclass(option, OpenConfig) for option in options):
            raise _not_loaded(where, name, kinds)
        raise ConfigError(f"{where}: unknown type {name!r}: expected one of {sorted(kinds)}")
    return _made(kinds[name], {key: value for key, value in data.items() if key != "type"}, where, path)


def _made(cls: type, given: dict[str, Any], where: str, path: str) -> Any:
    hints = field_hints(cls)
    retired = cls.retired_fields - hints.keys() if issubclass(cls, OpenConfig) else frozenset()
    given = {name: value for name, value in given.items() if name not in retired}
    later = {field.name for field in dataclasses.fields(cls) if "added_later" in field.metadata}
    if unequal := (hints.keys() ^ given.keys()) - (later & hints.keys()):
        writer, remedy = "another version of nfnet_flax", "use that version"
        if is_own(cls):
            writer, remedy = (
                f"another version of the code of {type_name(cls)}",
                "restore that version (a run keeps copies in its folder code/)",
            )
        raise ConfigError(
            f"{where}: fields {sorted(unequal)} are unknown or missing: it was written by {writer}; {remedy}"
        )
    return cls(**{name: from_json(hints[name], value, f"{path}.{name}".lstrip(".")) for name, value in given.items()})


def _not_loaded(where: str, name: str, kinds: dict[str, type]) -> CodeNotLoaded:
    loaded = [known for known in kinds if ":" in known]
    near = nearest(name, loaded)
    hint = f" (loaded are {', '.join(near)})" if near else ""
    file = f"{name.partition(':')[0].rpartition('.')[2]}.py"
    return CodeNotLoaded(
        f"{where} names the class {name} of a user's own code, which is not loaded{hint}. Code is run only "
        f"if you name it: give the file that defines the class (--code {file}), or import it first"
    )


def _tuple_from_json(hint: Any, data: list[Any], path: str) -> tuple[Any, ...]:
    for option in members_of(hint):
        arguments = typing.get_args(option) if typing.get_origin(option) is tuple else ()
        is_variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        hints = [arguments[0]] * len(data) if is_variadic else arguments
        if typing.get_origin(option) is tuple and len(hints) == len(data):
            return tuple(from_json(item_hint, item, path) for item_hint, item in zip(hints, data, strict=True))
    raise ConfigError(f"{path or 'recipe'} = {data!r}: expected {text_of(hint)}")


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
