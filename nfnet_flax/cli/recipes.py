"""The recipe that a command is given."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe


def load(recipe_path: str, options: list[str]) -> "Recipe":
    """The recipe that the options change; read before them, so that its own errors come first."""
    from nfnet_flax.debug import debug_recipe
    from nfnet_flax.recipe_file import load_recipe

    recipe = load_recipe(recipe_path)
    return debug_recipe(recipe) if "--debug" in options else recipe
