"""`nfnet plan`."""

import dataclasses
from typing import Annotated

import tyro

from nfnet_flax.cli.ahead import Code
from nfnet_flax.config import ConfigError, require
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.programs.plan import describe, plan, set_environment

    set_environment()  # before JAX looks for devices
    from nfnet_flax.cli import recipe_options
    from nfnet_flax.programs.compare import compare_topologies
    from nfnet_flax.programs.gpu import names_gpus
    from nfnet_flax.programs.gpu_plan import describe_gpu_plan, plan_for_gpus
    from nfnet_flax.programs.search import search
    from nfnet_flax.recipe import Recipe

    given = recipe_options.read("plan", argv)

    @dataclasses.dataclass(frozen=True)
    class PlanOptions:
        topology: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
        """Kind and number of TPU chips, such as v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1 or v6e:2x4; v5e:2x4/2 are the
        first two chips of v5e:2x4. Or of GPUs: h100:8, a100:8."""
        compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOPOLOGY ...")] = ()
        """Instead of a plan, tell whether the programs for these topologies of TPUs do the same arithmetic, so that
        they give the same bits: v5e:2x4 v5e:2x4/4 v5e:4x4."""
        search: bool = False
        """Find the fastest way to compute the batch that fits on TPUs: how many images at a time, which
        rematerialization."""
        debug: bool = "--debug" in argv
        """Plan the small network of `nfnet train --debug`."""
        code: Code = ()
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = given.config

    about = "Compile the training step of a recipe for TPUs or GPUs, and print what it needs."
    chosen = recipe_options.parse(PlanOptions, given, about)
    if chosen.compare:
        alone = chosen.topology is None and not chosen.search
        require(alone, "--compare", " ".join(chosen.compare), "give it without --topology and --search")
        for topology in filter(names_gpus, chosen.compare):
            remedy = "give TPUs: libraries choose on the GPU how they compute, so that programs do not show it"
            raise ConfigError(f"--compare = {topology!r}: {remedy}")
        return EXIT_DONE if compare_topologies(chosen.recipe, chosen.compare) else EXIT_WRONG
    if chosen.topology is None:
        raise ConfigError("--topology is missing: give a topology such as v5e:2x4, or --compare and several")
    if names_gpus(chosen.topology):
        remedy = f"leave it out for {chosen.topology}: it compares times, and the compiler for GPUs tells none"
        require(not chosen.search, "--search", chosen.search, remedy)
        print(describe_gpu_plan(plan_for_gpus(chosen.recipe, chosen.topology)))
        return EXIT_DONE
    result = search(chosen.recipe, chosen.topology) if chosen.search else plan(chosen.recipe, chosen.topology)
    print(describe(result))
    return EXIT_DONE
