"""Options of what a recipe leaves out or makes of another type: `--optim.sam.rho 0.05`, `--data.source FolderSource`.

tyro shows and sets the fields of what the recipe holds. Here, before it, a part of the recipe is replaced by another.
"""

import contextlib
import copy
import dataclasses
import io
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import tyro

from nfnet_flax.config import ConfigError, field_hints, members_of, unknown_name
from nfnet_flax.open_config import kinds_of, type_name

T = TypeVar("T")
_NONE = "none"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field of a recipe that may hold one of several configurations, or none."""

    path: tuple[str, ...]
    """Names of fields, from the recipe's own."""
    known: dict[str, type]
    """Classes of the configurations, by the names that the option takes."""
    is_optional: bool
    """Whether None is a value, too."""
    value: Any
    """What the recipe holds."""

    @property
    def option(self) -> str:
        """Such as `--optim.sam`."""
        return f"--{'.'.join(self.path)}".replace("_", "-")

    @property
    def names(self) -> list[str]:
        """What the option may be."""
        return [*self.known, *([_NONE] if self.is_optional else [])]

    def name_of(self, value: object) -> str:
        """What the option calls a value."""
        return next((name for name, kind in self.known.items() if kind is type(value)), type(value).__name__)


def choices(config: Any, path: tuple[str, ...] = ()) -> Iterator[Choice]:
    """All of a recipe, at any depth."""
    for name, hint in field_hints(type(config)).items():
        value = getattr(config, name)
        members = members_of(hint)
        known = _by_name(
            [member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)]
        )
        is_optional = types.NoneType in members
        if known and len(known) + is_optional > 1:
            yield Choice((*path, name), known, is_optional, value)
        if dataclasses.is_dataclass(value):
            yield from choices(value, (*path, name))


def _by_name(hints: list[type]) -> dict[str, type]:
    """The classes that a field may hold: by their short names, or with their modules where a name is another's, too."""
    known: dict[str, type] = {}
    for stored, kind in (item for hint in hints for item in kinds_of(hint).items()):
        known[stored if kind.__name__ in known else kind.__name__] = kind
    return known


def choose(config: T, options: list[str], prog: str) -> tuple[T, list[str]]:
    """Replaces the parts of a configuration that options name by type, or turn on by one of their fields.

    Args:
      config: a recipe as its file makes it, or a part of one.
      options: of the command line.
      prog: for messages, such as `nfnet train mine.py`.

    Returns:
      The configuration, whose fields are checked against one another where all options are known, and the other
      options.

    Raises:
      ConfigError: a name is none of the known types, or it is not clear of which type the given fields are.
    """
    for choice in list(choices(config)):
        name, fields, others = _taken(choice.option, options)
        if name is None and (not fields or choice.value is not None):
            continue  # as it is
        config, options = _with(config, choice.path, _chosen(choice, name, fields, prog)), others
    return config, options


def describe(config: object) -> str:
    """Help on all types but those that a configuration holds, whose options tyro shows."""
    parts = []
    for choice in choices(config):
        held = _NONE if choice.value is None else choice.name_of(choice.value)
        parts.append(f"{choice.option} {{{','.join(choice.names)}}}  (here: {held})")
        for name, kind in choice.known.items():
            if kind is not type(choice.value):
                parts.append(f"  {choice.option} {name}: then also")
                parts.append(textwrap.indent(_help(choice, kind), "  "))
    heading = (
        "Parts of another type, or that the recipe leaves out. A part of one type is turned on by any of its options."
    )
    return "\n".join([heading, *parts])


def _taken(option: str, options: list[str]) -> tuple[str | None, list[str], list[str]]:
    """The type's name that is given for an option, the options of its fields, and all others."""
    name: str | None = None
    fields: list[str] = []
    others: list[str] = []
    target = others
    words = iter(options)
    for word in words:
        key, equals, value = word.partition("=")
        key = key.replace("_", "-")
        if key == option:
            name, target = value if equals else next(words, ""), others
            continue
        if word.startswith("--"):
            target = fields if key.startswith(f"{option}.") else others
        target.append(word)
    return name, fields, others


def _chosen(choice: Choice, name: str | None, fields: list[str], prog: str) -> Any:
    if name is None:
        if len(choice.known) > 1:
            names = " or ".join(choice.names)
            raise ConfigError(
                f"{fields[0]}: {choice.option} is {_NONE} in this recipe: give {choice.option} {names}, too"
            )
        (kind,) = choice.known.values()
    elif name.lower() == _NONE and choice.is_optional:
        if fields:
            raise ConfigError(f"{fields[0]}: {choice.option} is {name}: leave one of the two out")
        return None
    else:
        named = choice.known | {type_name(kind): kind for kind in choice.known.values()}
        if name not in named:
            hint = f"; a number is the value of a field, such as {_first_option(choice)} {name}"
            error = unknown_name(f"value of {choice.option}", name, choice.names)
            raise ConfigError(f"{error}{hint}") if _is_number(name) else error
        kind = named[name]
    default = choice.value if type(choice.value) is kind else dataclasses.MISSING
    return tyro.cli(_holder(choice, kind, default), args=fields, prog=prog).value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_option(choice: Choice) -> str:
    """The option of the first field, of what the recipe holds or of the first type."""
    kind = next(iter(choice.known.values())) if choice.value is None else type(choice.value)
    return ".".join([choice.option, *(field.name.replace("_", "-") for field in dataclasses.fields(kind)[:1])])


def _holder(choice: Choice, kind: type, default: Any = dataclasses.MISSING) -> Any:
    """A class of one field, whose options tyro names as those of the recipe's."""
    field = dataclasses.field() if default is dataclasses.MISSING else dataclasses.field(default=default)
    named = Annotated[kind, tyro.conf.arg(name=".".join(choice.path))]  # type: ignore[valid-type]
    return dataclasses.make_dataclass(kind.__name__, [("value", named, field)])


def _help(choice: Choice, kind: type) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(_holder(choice, kind), args=["--help"])
    _, found, text = printed.getvalue().partition(f"{choice.option.removeprefix('--')} options")
    lines = [line.rstrip() for line in text.splitlines()[2:]]  # below a ruler
    return "\n".join(lines).rstrip() if found else "    (no options)"


def _with(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy with another value at a path. Its fields are not compared: options that follow may change others."""
    changed = copy.copy(config)
    name, *rest = path
    object.__setattr__(changed, name, _with(getattr(config, name), tuple(rest), value) if rest else value)
    return changed
