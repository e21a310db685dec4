"""The recipe that `nfnet train` and `nfnet plan` are given, and the options that change it."""

import dataclasses
from typing import TypeVar

import tyro

from nfnet_flax.cli import alternatives
from nfnet_flax.config import ConfigError
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import SyntheticSource
from nfnet_flax.debug import debug_recipe
from nfnet_flax.models import model_config
from nfnet_flax.optim import OptimConfig
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Given:
    """What stands after the name of a command."""

    prog: str
    """For messages, such as `nfnet train mine.py`."""
    options: list[str]
    """All but the recipe, and but those that `recipe` holds already."""
    recipe: Recipe
    """What other options may change."""
    is_debug: bool
    """Whether it is the small recipe of `--debug`."""


def read(command: str, argv: list[str]) -> Given:
    """Loads the recipe, ahead of its options, so that its own errors come first.

    Raises:
      ConfigError: there is no recipe, it cannot be loaded, or options name none of the types of a part of it.
    """
    wants_help = any(word in ("-h", "--help") for word in argv)
    is_debug = "--debug" in argv
    if argv and not argv[0].startswith("-"):
        prog, options, recipe = f"nfnet {command} {argv[0]}", argv[1:], load_recipe(argv[0])
    elif wants_help:
        prog, options, recipe = f"nfnet {command} RECIPE.py", argv, _example()
    else:
        named = next((word for word in argv if word.endswith(".py") or ".py:" in word), None)
        what = f"the recipe {named!r} must come first" if named else "the recipe is missing"
        words = " ".join(word for word in argv if word != named)
        raise ConfigError(f"{what}: nfnet {command} {named or 'RECIPE.py'} {words or '...'}".rstrip())
    recipe = debug_recipe(recipe) if is_debug else recipe
    if wants_help:
        return Given(prog, ["--help"], recipe, is_debug)
    recipe, options = alternatives.choose(recipe, options, prog)
    return Given(prog, options, recipe, is_debug)


def parse(kind: type[T], given: Given, description: str) -> T:
    """The options of a command, one of which is the recipe; ends the process after help or a wrong option."""
    try:
        return tyro.cli(kind, args=given.options, prog=given.prog, description=description)
    except SystemExit as stopped:
        if stopped.code in (None, 0):  # after help
            print(alternatives.describe(given.recipe))
        raise


def _example() -> Recipe:
    """Stands for a recipe in help that is asked for without one: the classes' own defaults."""
    data = DataConfig(source=SyntheticSource())
    return Recipe(name="example", model=model_config("nfnet_f0"), num_classes=1000, data=data, optim=OptimConfig())
