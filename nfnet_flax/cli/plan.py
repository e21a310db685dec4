"""`nfnet plan`."""

import dataclasses
from typing import Annotated

import tyro

from nfnet_flax.cli.ahead import Code
from nfnet_flax.exit_codes import EXIT_DONE


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.programs.plan import describe, plan, search, set_environment

    set_environment()  # before JAX looks for devices
    from nfnet_flax.cli import recipe_options
    from nfnet_flax.recipe import Recipe

    given = recipe_options.read("plan", argv)

    @dataclasses.dataclass(frozen=True)
    class PlanOptions:
        topology: str
        """Kind and number of TPU chips, such as v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1 or v6e:2x4."""
        search: bool = False
        """Find the largest batch per device that fits, and the cheapest rematerialization for it."""
        debug: bool = "--debug" in argv
        """Plan the small network of `nfnet train --debug`."""
        code: Code = ()
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = given.config

    about = "Compile the training step of a recipe for a TPU, and print the memory and time that it needs."
    chosen = recipe_options.parse(PlanOptions, given, about)
    result = search(chosen.recipe, chosen.topology)[-1] if chosen.search else plan(chosen.recipe, chosen.topology)
    print(describe(result))
    return EXIT_DONE
