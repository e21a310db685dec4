"""Options that turn on a part of a recipe or replace it by one of another type.

Examples: `--optim.sam.rho 0.05`, `--data.source FolderSource`. tyro only shows and sets the fields of the parts that
the recipe has; the code here runs before tyro and exchanges parts.
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

from nfnet_flax.cli.options import parsed
from nfnet_flax.config import ConfigError, field_hints, members_of, unknown_name
from nfnet_flax.open_config import kinds_of, type_name

T = TypeVar("T")
_NONE = "none"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field of a recipe that may hold a configuration of one of several classes, or None."""

    path: tuple[str, ...]
    """Names of the fields that lead to it, from a field of the recipe on."""
    known: dict[str, type]
    """Name that the option takes -> class of the configuration."""
    is_optional: bool
    """Whether the field may be None."""
    value: Any
    """Value of the field in the recipe."""

    @property
    def option(self) -> str:
        """Name of the command line option, such as `--optim.sam`."""
        return f"--{'.'.join(self.path)}".replace("_", "-")

    @property
    def names(self) -> list[str]:
        """Values that the option takes."""
        return [*self.known, *([_NONE] if self.is_optional else [])]

    def name_of(self, value: object) -> str:
        """Name of a value, as the option takes it."""
        return next((name for name, kind in self.known.items() if kind is type(value)), type(value).__name__)


def choices(config: Any, path: tuple[str, ...] = ()) -> Iterator[Choice]:
    """All such fields of a recipe and of its nested parts."""
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
    """The classes that a field may hold, by their short names, or with the module if two have the same short name."""
    known: dict[str, type] = {}
    for stored, kind in (item for hint in hints for item in kinds_of(hint).items()):
        known[stored if kind.__name__ in known else kind.__name__] = kind
    return known


def choose(config: T, options: list[str], prog: str) -> tuple[T, list[str]]:
    """Replaces parts of a configuration for which an option names another type, or that a field's option turns on.

    Args:
      config: a recipe as its file makes it, or a part of one.
      options: options of the command line.
      prog: name of the program in messages, such as `nfnet train mine.py`.

    Returns:
      The configuration, and the options that remain for tyro. Whether the configuration's fields fit together is
      checked later, when all options are applied.

    Raises:
      ConfigError: a name is none of the known types, or it is not clear to which type the given fields belong.
    """
    for choice in list(choices(config)):
        name, fields, others = _taken(choice.option, options)
        if name is None and (not fields or choice.value is not None):
            continue  # as it is
        config, options = _with(config, choice.path, _chosen(choice, name, fields, prog)), others
    return config, options


def describe(config: object) -> str:
    """Help text on the types that a configuration does not hold; tyro shows the options of those that it holds."""
    parts = []
    for choice in choices(config):
        held = _NONE if choice.value is None else choice.name_of(choice.value)
        parts.append(f"{choice.option} {{{','.join(choice.names)}}}  (here: {held})")
        for name, kind in choice.known.items():
            if kind is not type(choice.value):
                parts.append(f"  {choice.option} {name}: then also")
                parts.append(textwrap.indent(_help(choice, kind), "  "))
    heading = (
        "Parts that may be of another type, or that the recipe leaves out. A part with a single type is turned on by "
        "any of its options."
    )
    return "\n".join([heading, *parts])


def _taken(option: str, options: list[str]) -> tuple[str | None, list[str], list[str]]:
    """The name of a type that is given for an option, the options of its fields, and all other options."""
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
    return parsed(_holder(choice, kind, default), fields, prog).value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_option(choice: Choice) -> str:
    """The option of the first field of the recipe's value, or of the first type if that value is None."""
    kind = next(iter(choice.known.values())) if choice.value is None else type(choice.value)
    return ".".join([choice.option, *(field.name.replace("_", "-") for field in dataclasses.fields(kind)[:1])])


def _holder(choice: Choice, kind: type, default: Any = dataclasses.MISSING) -> Any:
    """A class with one field, for which tyro makes options with the same names as those of the recipe."""
    field = dataclasses.field() if default is dataclasses.MISSING else dataclasses.field(default=default)
    named = Annotated[kind, tyro.conf.arg(name=".".join(choice.path))]  # type: ignore[valid-type]
    return dataclasses.make_dataclass(kind.__name__, [("value", named, field)])


def _help(choice: Choice, kind: type) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parsed(_holder(choice, kind), ["--help"], "")
    _, found, text = printed.getvalue().partition(f"{choice.option.removeprefix('--')} options")
    lines = [line.rstrip() for line in text.splitlines()[2:]]  # below a ruler
    return "\n".join(lines).rstrip() if found else "    (no options)"


def _with(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy with another value at a path. Its fields are not checked yet: options that follow may change more."""
    changed = copy.copy(config)
    name, *rest = path
    object.__setattr__(changed, name, _with(getattr(config, name), tuple(rest), value) if rest else value)
    return changed
