"""Parts of a recipe that users may define: their base class, the table of known classes, and the names of classes.

A field of a recipe that is annotated with such a base class takes an instance of any class that derives from it. The
package's own classes are listed in a table; those of users are found among the classes that are loaded.
"""

import dataclasses
import inspect
import operator
import os
from collections.abc import Iterator
from typing import Any, ClassVar, Self, TypeVar, cast

from nfnet_flax.config import ConfigError, check_types, require
from nfnet_flax.own_code import is_in_use, public_name
from nfnet_flax.paths import hub_name
from nfnet_flax.storage.url import is_url

C = TypeVar("C")
_PACKAGE = __name__.partition(".")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenConfig:
    """A part of a recipe that users may define: a frozen dataclass.

    Its fields are stored with a run, are compared when the run continues, and are command line options. A field is a
    number, a text, a Literal, None, a tuple of these, or another frozen dataclass.
    """

    place_fields: ClassVar[tuple[str, ...]] = ()
    """Names of fields that only say where files are on this machine: paths, or tuples of paths. They may change when a
    run continues, and are stored as absolute paths; the files are compared by their content."""
    decides_updates: ClassVar[bool] = True
    """Whether updates may depend on it. If not, its code may change while the run continues."""
    retired_fields: ClassVar[frozenset[str]] = frozenset()
    """Names of fields that earlier versions had and that decided nothing: they are ignored in stored configurations."""

    def __post_init__(self) -> None:
        """Checks the types of the fields; a class with checks of its own calls `super().__post_init__()` first."""
        kind = type(self)
        if "__annotations__" in vars(kind) and "__dataclass_fields__" not in vars(kind):
            raise ConfigError(
                f"{kind.__name__} has fields and is no dataclass: put "
                "@dataclasses.dataclass(frozen=True, kw_only=True) above it"
            )
        check_types(self)
        names = {field.name for field in dataclasses.fields(self)}
        for name in self.place_fields:
            require(name in names, f"{kind.__name__}.place_fields", self.place_fields, f"{name!r} is no field of it")

    def with_absolute_places(self) -> Self:
        """A copy whose `place_fields` are absolute paths, which mean the same in every current folder."""
        return dataclasses.replace(self, **{name: _absolute(getattr(self, name)) for name in self.place_fields})


def _absolute(value: object) -> object:
    # Symbolic links are not resolved: a pattern is not a path, and a link may later point to another copy of the files.
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    if not isinstance(value, str) or hub_name(value) or is_url(value):
        return value
    return os.path.abspath(os.path.expanduser(value))


_TABLES: dict[type, tuple[type, ...]] = {}
"""Base class -> the package's classes that derive from it."""


def declare_kinds(base: type, *kinds: type) -> None:
    """Registers the package's own classes of a base class; called once, where they are imported together."""
    _TABLES[base] = kinds


def is_own(kind: type) -> bool:
    """Whether a class is defined in a user's code, not in the package."""
    return kind.__module__.partition(".")[0] != _PACKAGE


def type_name(kind: type) -> str:
    """Name under which a class is stored: its own, with that of its module before it if it is defined by a user."""
    return f"{public_name(kind.__module__)}:{kind.__qualname__}" if is_own(kind) else kind.__name__


def kinds_of(hint: type) -> dict[str, type]:
    """Stored name -> class, for all classes of which a field annotated with `hint` may hold an instance.

    For a base class that users may derive from, these are the package's classes, in the order of the table, and the
    users' classes that are loaded. Of several classes with the same name (a file was loaded twice) the newest counts.
    Classes of a file that ended with an error do not count.
    """
    if not issubclass(hint, OpenConfig):
        return {type_name(hint): hint}
    users = (kind for kind in _subclasses(hint) if is_own(kind) and is_in_use(kind))
    own = {type_name(kind): kind for kind in users if not inspect.isabstract(kind)}
    known = _TABLES.get(hint, () if inspect.isabstract(hint) else (hint,))
    return {type_name(kind): kind for kind in known} | own


def _subclasses(kind: type) -> Iterator[type]:
    """All subclasses that are loaded, older ones first."""
    subclasses: list[type] = kind.__subclasses__()
    for found in subclasses:
        yield found
        yield from _subclasses(found)


def with_places_of(config: C, other: object) -> C:
    """A configuration with the `place_fields` of another one, also in nested parts if both have the same type."""
    mine: Any = config
    if not _is_config(mine) or type_name(type(mine)) != type_name(type(other)):
        return config
    places = mine.place_fields if isinstance(mine, OpenConfig) else ()
    changes = {}
    for field in dataclasses.fields(mine):
        value, theirs = getattr(mine, field.name), getattr(other, field.name)
        changed = theirs if field.name in places else with_places_of(value, theirs)
        if changed is not value:
            changes[field.name] = changed
    return dataclasses.replace(mine, **changes) if changes else config


def with_absolute_places(config: C) -> C:
    """A configuration whose `place_fields`, also those of nested parts, are absolute paths."""
    mine: Any = config
    if isinstance(mine, tuple):
        placed = tuple(map(with_absolute_places, mine))
        return config if all(map(operator.is_, placed, mine)) else cast(C, placed)
    if not _is_config(mine):
        return config
    values = {field.name: getattr(mine, field.name) for field in dataclasses.fields(mine)}
    changed = {name: with_absolute_places(value) for name, value in values.items()}
    if changes := {name: value for name, value in changed.items() if value is not values[name]}:
        mine = dataclasses.replace(mine, **changes)
    if isinstance(mine, OpenConfig) and mine.place_fields:
        mine = mine.with_absolute_places()
    return cast(C, mine)


def own_classes(config: Any) -> list[type]:
    """Classes of a user's code in a configuration and its nested parts, with the users' classes they derive from; only
    those on which updates may depend."""
    found: list[type] = []
    if isinstance(config, OpenConfig) and not config.decides_updates:
        return found
    parts = list(config) if isinstance(config, tuple) else []
    if _is_config(config):
        found += [kind for kind in type(config).__mro__ if dataclasses.is_dataclass(kind) and is_own(kind)]
        parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    found += [kind for part in parts for kind in own_classes(part)]
    return list(dict.fromkeys(found))


def _is_config(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
