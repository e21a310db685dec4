"""`nfnet plan`."""

import dataclasses
import sys
from typing import Annotated

import tyro

from nfnet_flax.cli.recipes import load
from nfnet_flax.cli.usage import USAGE
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    if not argv or argv[0].startswith("-"):
        print(USAGE, end="", file=sys.stdout if "--help" in argv else sys.stderr)
        return EXIT_DONE if "--help" in argv else EXIT_BAD_INPUT
    from nfnet_flax.plan import describe, plan, search, set_environment

    set_environment()  # before JAX looks for devices
    from nfnet_flax.recipe import Recipe

    recipe_path, *options = argv
    loaded = load(recipe_path, options)

    @dataclasses.dataclass(frozen=True)
    class PlanOptions:
        topology: str
        """Such as v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1 or v6e:2x4."""
        search: bool = False
        """Find the largest batch per device that fits, and the cheapest rematerialization for it."""
        debug: bool = "--debug" in options
        """Plan the small network of `nfnet train --debug`."""
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = loaded

    chosen = tyro.cli(PlanOptions, args=options, prog=f"nfnet plan {recipe_path}", description="Plan a run on TPUs.")
    result = search(chosen.recipe, chosen.topology)[-1] if chosen.search else plan(chosen.recipe, chosen.topology)
    print(describe(result))
    return EXIT_DONE
