"""What the published runs would cost on TPUs, by the TPU compiler's estimate of their training step.

A run is 360 epochs of ImageNet in batches of 4096, F6 with SAM, as `recipes/nfnet_imagenet.py` trains it: in parts,
whose gradients are added in a fixed order. Of the ways to need less memory the one that computes least again is taken
that fits into the chip.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nfnet_flax.claims import published
from nfnet_flax.claims.compiled_step import Compiled, compiled, compiled_of, prepared_folder, without_images
from nfnet_flax.claims.evidence import Evidence, markdown_table, origin
from nfnet_flax.imagenet import imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, model_config
from nfnet_flax.models.classifier import Rematerialization
from nfnet_flax.optim import OptimConfig, SAMConfig
from nfnet_flax.progress import tracking
from nfnet_flax.recipe import Recipe
from nfnet_flax.units import duration, human_size, scaled

CLAIM = "cost"
RUNS = tuple(published.STEP_MS)
"""Networks of the published runs."""
_NOTE = (
    "Estimates of the TPU compiler for one training step, times the number of steps of the run; nothing was measured. "
    "Not included: reading and decoding images, starts and compilation, evaluations, checkpoints, preemptions. A "
    "chip-hour is an hour of one chip; the price is chip-hours times the rate that --rate gives. Where the package "
    "does not know the clock of a chip, the estimate is in cycles only, unless --clock-ghz gives the clock."
)
_PUBLISHED_NOTE = (
    "For comparison, from the published time of a step (arXiv 2102.06171, table 3; TPUv3, 32 images for each core), in "
    "the same way:"
)

CompileFor = Callable[[Rematerialization], Compiled]
"""Gives the compilation for a rematerialization."""


def recipe_of(name: str, images_per_part: int) -> Recipe:
    """A published run, without what only the input does: mixing and RandAugment.

    Args:
      name: one of `RUNS`.
      images_per_part: number of images that a chip computes at a time.

    Raises:
      ConfigError: the batch cannot be cut into such parts.
    """
    # The defaults are published, those of `SAMConfig` too.
    optim = OptimConfig(sam=SAMConfig() if name == "nfnet_f6" else None)
    recipe = imagenet_recipe(
        name,
        model_config(name, compute_dtype="bfloat16"),
        IMAGE_SIZES[name],
        optim,
        num_epochs=published.NUM_EPOCHS,
        batch_size=published.BATCH_SIZE,
        images_per_part=images_per_part,
    )
    return without_images(recipe)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The step of one network on one slice."""

    network: str
    topology: str
    num_steps: int
    """Number of steps of the whole run."""
    compiled: Compiled
    """The compilation that was chosen, or the last one if none fits."""


def study(recipes: Sequence[Recipe], topologies: Sequence[str], folder: Path, timeout_s: float) -> list[Estimate]:
    """Compiles every recipe for every topology, one after the other; what `folder` has already is not repeated.

    Args:
      recipes: the runs; their names are those of the networks.
      topologies: slices, such as `v5e:8x16`.
      folder: has a file for each compilation, written as soon as it has ended.
      timeout_s: time limit of one compilation, in seconds.

    Raises:
      ConfigError: the folder has plans of other recipes, or a file in it is damaged.
      StorageFailed: a file cannot be read.
    """
    found: list[Estimate] = []
    pairs = [(recipe, topology) for recipe in recipes for topology in topologies]
    with tracking("estimating", len(pairs), "steps", at_once=True) as task:
        for recipe, topology in pairs:
            place = prepared_folder(folder, recipe, topology)

            def compile_for(kind: Rematerialization, place: Path = place, topology: str = topology) -> Compiled:
                return compiled(place, topology, kind, timeout_s)

            found.append(
                Estimate(
                    network=recipe.name,
                    topology=topology,
                    num_steps=recipe.total_steps(published.NUM_IMAGES),
                    compiled=first_that_fits(compile_for),
                )
            )
            task.advance()
    return found


def first_that_fits(compile_for: CompileFor) -> Compiled:
    """The compilation that computes least again of those that fit into the chip's memory; the last one if none fits.

    After one that did not compile for another reason, such as a time limit, no other is tried: it would not be what was
    asked for, and with more rematerialization the program is longer.
    """
    found: Compiled | None = None
    for kind in typing.get_args(Rematerialization):
        found = compile_for(kind)
        if not found.is_too_large:
            break
    assert found is not None
    return found


def data_of(
    estimates: Sequence[Estimate], rates: Mapping[str, float], clocks_hz: Mapping[str, float]
) -> dict[str, Any]:
    """What was found, for `evidence.json`.

    Args:
      estimates: result of `study`.
      rates: kind of chip, such as `v5e` -> US dollars for an hour of one.
      clocks_hz: kind of chip -> clock, for kinds whose clock the package does not know.
    """
    return {
        "estimates": [dataclasses.asdict(estimate) for estimate in estimates],
        "usd_per_chip_hour": dict(rates),
        "clocks_hz": dict(clocks_hz),
    }


def tables(found: Evidence) -> dict[str, str]:
    """Name of each table -> its text in Markdown."""
    stored = found.data["estimates"]
    estimates = [Estimate(**{**entry, "compiled": compiled_of(entry["compiled"])}) for entry in stored]
    rates, clocks_hz = found.data["usd_per_chip_hour"], found.data["clocks_hz"]
    columns = ["network", "slice", "chips", "images per chip", "at a time", "rematerialization", "memory per chip"]
    columns += ["step, estimate", "days", "chip-hours", "price, USD"]
    rows = [_row(estimate, rates, clocks_hz) for estimate in estimates]
    names = list(dict.fromkeys(estimate.network for estimate in estimates))
    return {"estimates": markdown_table(columns, rows), "published": _published_table(names)}


def text(found: Evidence) -> str:
    """All tables, and what they mean."""
    made = tables(found)
    compilers = sorted({entry["compiled"]["libtpu"] for entry in found.data["estimates"]} - {""})
    about = f"{_NOTE} Compiled by libtpu {', '.join(compilers)}." if compilers else _NOTE
    return "\n\n".join([origin(found), about, made["estimates"], _PUBLISHED_NOTE, made["published"]])


def _row(estimate: Estimate, rates: Mapping[str, float], clocks_hz: Mapping[str, float]) -> list[str]:
    plan = estimate.compiled.plan
    first = [estimate.network, estimate.topology]
    if plan is None:
        problem = estimate.compiled.problem.replace("|", "/")  # which would end a cell
        return [*first, *[""] * 3, estimate.compiled.rematerialization, "", problem, *[""] * 3]
    per_chip = plan.num_devices / estimate.compiled.num_chips
    fits = "" if plan.fits else " (DOES NOT FIT)"
    return [
        *first,
        f"{estimate.compiled.num_chips}",
        f"{plan.images_per_device * per_chip:.0f}",
        f"{plan.images_per_turn * per_chip:.0f}",
        plan.rematerialization,
        f"{human_size(plan.peak_bytes * per_chip)} of {human_size(plan.hbm_bytes * per_chip)}{fits}",
        *_costs(estimate, rates, clocks_hz),
    ]


def _costs(estimate: Estimate, rates: Mapping[str, float], clocks_hz: Mapping[str, float]) -> Iterator[str]:
    """Time of a step, days, chip-hours and price; what is not known, or of a step that does not fit, is empty."""
    plan, kind = estimate.compiled.plan, estimate.topology.partition(":")[0]
    assert plan is not None
    clock_hz = plan.clock_hz or clocks_hz.get(kind)
    cycles = f"{scaled(plan.cycles)} cycles"
    yield cycles if clock_hz is None else f"{cycles} = {duration(plan.cycles / clock_hz)}"
    if clock_hz is None or not plan.fits:
        yield from ("", "", "")
        return
    hours = plan.cycles / clock_hz * estimate.num_steps / 3600
    chip_hours = hours * estimate.compiled.num_chips
    yield f"{hours / 24:.1f}"
    yield f"{chip_hours:,.0f}"
    yield f"{chip_hours * rates[kind]:,.0f}" if kind in rates else ""


def _published_table(names: Sequence[str]) -> str:
    num_steps = round(published.NUM_EPOCHS * published.NUM_IMAGES / published.BATCH_SIZE)
    num_cores = published.BATCH_SIZE // published.STEP_IMAGES
    rows = []
    for name in names:
        if name in published.STEP_MS:
            hours = published.STEP_MS[name] / 1e3 * num_steps / 3600
            step = f"{published.STEP_MS[name]} ms"
            rows.append([name, f"{num_cores} TPUv3 cores", step, f"{hours / 24:.1f}", f"{hours * num_cores:,.0f}"])
    return markdown_table(["network", "slice", "step, published", "days", "core-hours"], rows)
