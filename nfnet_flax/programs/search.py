"""Searches the fastest way to compute a recipe's batch on a TPU that fits into its memory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import get_args

from nfnet_flax.models.classifier import Rematerialization
from nfnet_flax.programs.plan import Plan, mesh_of, plan
from nfnet_flax.recipe import Recipe
from nfnet_flax.units import human_size, scaled

PlanOf = Callable[[Rematerialization, int], Plan]
"""Gives the plan for a rematerialization and a number of images that a device computes at a time."""


def search(recipe: Recipe, topology: str) -> Plan:
    """The fastest plan of a recipe's batch that fits; the one with the least memory if none fits. A line is printed for
    each plan, and at the end the options of the recommended one, and why.

    Raises:
      ConfigError: as for `plan`.
    """
    from nfnet_flax.parallel.mesh import num_batch_shards

    num_groups = num_batch_shards(mesh_of(recipe, topology))

    def plan_of(rematerialization: Rematerialization, images: int) -> Plan:
        num_parts = recipe.data.batch_size // images
        execution = dataclasses.replace(
            recipe.execution, rematerialization=rematerialization, num_microbatches=num_parts
        )
        found = plan(dataclasses.replace(recipe, execution=execution), topology)
        print(
            f"{rematerialization:>6}, {images} images at a time: {human_size(found.peak_bytes)}, "
            f"{scaled(found.cycles / found.images_per_device)} cycles per image, "
            f"{'fits' if found.fits else 'does not fit'}",
            flush=True,
        )
        return found

    chosen = fastest(_numbers_of_images(recipe, topology, num_groups), plan_of)
    why = "of those that fit, this takes the least time" if chosen.fits else "NONE fits; this needs the least memory"
    print(
        f"{why}: --execution.rematerialization {chosen.rematerialization} "
        f"--execution.num-microbatches {chosen.batch_size // chosen.images_per_turn}"
    )
    return chosen


def fastest(numbers_of_images: Sequence[int], plan_of: PlanOf) -> Plan:
    """The fastest plan that fits; the one with the least memory if none fits.

    For each rematerialization, beginning with the one that computes least again, numbers of images are tried from the
    largest, until one fits and the next smaller one takes more time. What fits with less rematerialization is not tried
    with more, which would only cost time.

    Args:
      numbers_of_images: how many images a device may compute at a time, from the largest.
      plan_of: gives a plan.
    """
    best: Plan | None = None
    least: Plan | None = None
    for rematerialization in get_args(Rematerialization):
        fits = 0 if best is None else best.images_per_turn
        for images in (number for number in numbers_of_images if number > fits):
            found = plan_of(rematerialization, images)
            least = found if least is None or found.peak_bytes < least.peak_bytes else least
            if not found.fits:
                continue
            if best is not None and best.cycles <= found.cycles:
                break
            best = found
    chosen = best or least
    assert chosen is not None, numbers_of_images
    return chosen


def _numbers_of_images(recipe: Recipe, topology: str, num_groups: int) -> list[int]:
    """How many images a device may compute at a time, from the largest."""
    from nfnet_flax.training.build import build_structure

    images, sam = recipe.data.batch_size // num_groups, recipe.optim.sam
    structure = build_structure(recipe, mesh_of(recipe, topology))
    given = recipe.execution.num_microbatches
    if given is not None and (structure.batch_stat_shapes or (sam is not None and sam.fraction < 1.0)):
        return [recipe.data.batch_size // given]  # another number of parts would be another training
    found = [images]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found
