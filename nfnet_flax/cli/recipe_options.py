"""The recipe that is given to a command, and the options that change it or a part of it."""

import dataclasses
from typing import Generic, TypeVar

from nfnet_flax.cli import alternatives
from nfnet_flax.cli.ahead import load_given_code
from nfnet_flax.cli.options import dash_note, parsed
from nfnet_flax.config import ConfigError
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import SyntheticSource
from nfnet_flax.debug import debug_recipe
from nfnet_flax.models import model_config
from nfnet_flax.optim import OptimConfig
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe

T = TypeVar("T")
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Given(Generic[Config]):
    """The arguments of a command after its name."""

    prog: str
    """Name of the program in messages, such as `nfnet train mine.py`."""
    options: list[str]
    """Options that are still to be read: without the recipe, and without those that `config` already contains."""
    config: Config
    """The configuration that these options may change."""


def read(command: str, argv: list[str]) -> Given[Recipe]:
    """Loads the code that `--code` names and then the recipe, before its options, so that its errors come first.

    Raises:
      ConfigError: there is no recipe, it or other code cannot be loaded, or options name none of the types of a part.
    """
    load_given_code(argv)
    if argv and not argv[0].startswith("-"):
        prog, options, recipe = f"nfnet {command} {argv[0]}", argv[1:], load_recipe(argv[0])
    elif _wants_help(argv):
        prog, options, recipe = f"nfnet {command} RECIPE.py", argv, example()
    else:
        if argv and (note := dash_note([argv[0], argv[0].partition(":")[0]])) is not None:
            raise ConfigError(f"the recipe is missing: {note}")
        named = next((word for word in argv if word.endswith(".py") or ".py:" in word), None)
        what = f"the recipe {named!r} must come first" if named else "the recipe is missing"
        words = " ".join(word for word in argv if word != named)
        raise ConfigError(f"{what}: nfnet {command} {named or 'RECIPE.py'} {words or '...'}".rstrip())
    return read_changes(prog, options, debug_recipe(recipe) if "--debug" in argv else recipe)


def read_changes(prog: str, options: list[str], config: Config) -> Given[Config]:
    """Applies those options that name the type of a part of a configuration, or turn a part on.

    Raises:
      ConfigError: options name none of the types of a part, or are of earlier versions.
    """
    if _wants_help(options):
        return Given(prog, ["--help"], config)
    _refuse_moved(options)
    config, options = alternatives.choose(config, options, prog)
    return Given(prog, options, config)


def _refuse_moved(options: list[str]) -> None:
    """Raises `ConfigError` for an option of earlier versions, and names the option that replaces it."""
    for word in options:
        name = word.removeprefix("--optim.").partition("=")[0].partition(".")[0].replace("-", "_")
        if word.startswith("--optim.") and name in OptimConfig.moved_fields:
            field, kind = OptimConfig.moved_fields[name]
            raise ConfigError(f"{word}: there is no optim.{name}: give --optim.{field} {kind}, and --optim.{field}.*")


def parse(kind: type[T], given: Given[Config], description: str) -> T:
    """The options of a command, including `given.config`; ends the process after help or a wrong option."""
    try:
        return parsed(kind, given.options, given.prog, description)
    except SystemExit as stopped:
        if stopped.code in (None, 0):  # after help
            print(alternatives.describe(given.config))
        raise


def _wants_help(argv: list[str]) -> bool:
    return any(word in ("-h", "--help") for word in argv)


def example() -> Recipe:
    """A recipe of defaults, for help that is requested without a recipe."""
    data = DataConfig(source=SyntheticSource())
    return Recipe(name="example", model=model_config("nfnet_f0"), num_classes=1000, data=data, optim=OptimConfig())
