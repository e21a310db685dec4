"""In what a recipe differs from the one that it derives from, or from another run's: field by field."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from nfnet_flax.config import field_hints
from nfnet_flax.config_json import to_json
from nfnet_flax.models.registry import VARIANTS, name_of
from nfnet_flax.open_config import OpenConfig, type_name
from nfnet_flax.recipe import Recipe

ABSENT = "-"
"""Value of a field that a recipe does not have, as another class is chosen there."""
GIVEN = "(no default)"
"""Default of a field that every recipe has to give."""
_TYPE = "type"
Fields = dict[str, str]
"""Path of a field, such as `optim.clipping.ratio` -> its value as JSON, or the name of a class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A field in which recipes differ."""

    field: str
    values: tuple[str, ...]
    """Its value in each recipe, in their order, or `ABSENT`."""


def differences_between(recipes: Sequence[Fields]) -> list[Difference]:
    """The fields whose values are not equal in all recipes, in the order of the recipes' fields."""
    names = dict.fromkeys(name for fields in recipes for name in fields)
    rows = (Difference(field=name, values=tuple(fields.get(name, ABSENT) for fields in recipes)) for name in names)
    return [row for row in rows if len(set(row.values)) > 1]


def fields_of(config: Any) -> Fields:
    """All fields of a configuration and of its parts."""
    found: Fields = {}
    _collect(config, "", found)
    return found


def defaults_of(recipe: Recipe) -> Fields:
    """The recipe's fields at their defaults: those of the classes that it chooses, and for a network that has a name
    those of this network. A field without a default has the value `GIVEN`."""
    found: Fields = {}
    _collect_defaults(recipe, "", found)
    name = name_of(recipe.model)
    if name is not None:
        found = {field: value for field, value in found.items() if not field.startswith("model.")}
        found |= {f"model.{field}": value for field, value in fields_of(VARIANTS[name]).items()}
    return {field: found[field] for field in fields_of(recipe) if field in found}


def _collect(config: Any, path: str, found: Fields) -> None:
    found[f"{path}{_TYPE}"] = type_name(type(config))
    for name in field_hints(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            _collect(value, f"{path}{name}.", found)
        else:
            found[f"{path}{name}"] = _text(value)


def _collect_defaults(config: Any, path: str, found: Fields) -> None:
    found[f"{path}{_TYPE}"] = type_name(type(config))
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field)
        name = f"{path}{field.name}"
        if not dataclasses.is_dataclass(value):
            found[name] = _shown(default)
        elif type(default) is type(value):
            _collect(default, f"{name}.", found)
        else:
            _collect_defaults(value, f"{name}.", found)
            has_one_class = default is dataclasses.MISSING and not isinstance(value, OpenConfig)
            found[f"{name}.{_TYPE}"] = type_name(type(value)) if has_one_class else _shown(default)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return GIVEN
    return type_name(type(default)) if dataclasses.is_dataclass(default) else _text(default)


def _text(value: Any) -> str:
    return json.dumps(to_json(value), ensure_ascii=False)
