"""Ordered (pattern -> value) lists that give every parameter a value by its name."""

import dataclasses
import fnmatch
from collections.abc import Iterable

from nfnet_flax.config import ConfigError, check_types


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Parameters whose name matches a shell-style pattern, such as `*.bias`, and their value."""

    pattern: str
    value: float

    def __post_init__(self) -> None:
        check_types(self)


def assign(field: str, groups: tuple[ParamGroup, ...], names: Iterable[str]) -> dict[str, float]:
    """The value of the first group that matches, for every name.

    Args:
      field: of the recipe, for the message of an error.
      groups: tried in order.
      names: of all parameters.

    Raises:
      ConfigError: a parameter is in no group, or a pattern matches no parameter at all.
    """
    names = list(names)
    for group in groups:
        if not any(fnmatch.fnmatchcase(name, group.pattern) for name in names):
            raise ConfigError(f"{field}: pattern {group.pattern!r} matches no parameter; names look like {names[0]!r}")
    values = {}
    for name in names:
        match = next((group for group in groups if fnmatch.fnmatchcase(name, group.pattern)), None)
        if match is None:
            raise ConfigError(f"{field}: parameter {name!r} is in no group; end the list with the pattern '*'")
        values[name] = match.value
    return values
