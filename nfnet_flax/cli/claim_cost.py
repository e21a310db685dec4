"""`nfnet claim cost`."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro

from nfnet_flax.cli.claim_output import conclude
from nfnet_flax.cli.options import COUNTS, DIR, NAMES, SECONDS, parsed
from nfnet_flax.config import ConfigError, require, require_count, unknown_name
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG
from nfnet_flax.messages import warn
from nfnet_flax.paths import made_folder


@dataclasses.dataclass(frozen=True)
class CostOptions:
    """What the published runs would cost on TPUs: memory per chip, days, chip-hours and price.

    The TPU compiler (extra `tpu`) compiles each training step; no TPU is needed, and its estimates are no measurements.
    A published run is 360 epochs of ImageNet in batches of 4096 images, F6 with SAM (sharpness-aware minimization,
    which computes two gradients for each update). Each chip computes its images in parts, one after the other.
    Compiling F0 takes minutes of one core; allow hours and more than 10 GB of memory for F5 and F6, and so many hours
    for the default, all networks on three kinds of chip. The same command continues what was stopped or killed.
    """

    models: Annotated[tuple[str, ...], NAMES] = ()
    """Networks: nfnet_f0 ... nfnet_f6; without this option all of them."""
    topologies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOPOLOGY ...")] = ("v4:4x4x8", "v5e:8x16", "v6e:8x16")
    """Kinds and grids of TPU chips, such as v5e:8x16. Those without this option have 128 chips, so 32 images for each
    chip, as the published TPUv3 cores."""
    images_per_part: Annotated[tuple[int, ...], COUNTS] = (16,)
    """Numbers of images in a part, which a chip computes at a time; 16 are those of the recipe. More take more memory
    and less time, and the slice must have a part for each chip. F6 with other parts is another training, as SAM's first
    gradient is that of a fifth of each part."""
    rate: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND=USD ...")] = ()
    """Price of an hour of one chip in US dollars, for each kind of chip: v5e=1.5. Without it there are no prices."""
    clock_ghz: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND=GHZ ...")] = ()
    """Clock in GHz of a kind of chip whose clock the package does not know, such as v6e: without it, its steps are in
    cycles."""
    timeout_s: Annotated[float, SECONDS] = 7200.0
    """Time limit of one compilation."""
    out: Annotated[str, DIR] = "claims/cost"
    """Folder for evidence.json and for a file of each compilation."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(CostOptions, argv, "nfnet claim cost")
    rates, clocks_ghz = _numbers("rate", options.rate), _numbers("clock_ghz", options.clock_ghz)
    for count in options.images_per_part:
        require_count("images_per_part", count, most=4096)
    require(bool(options.images_per_part), "images_per_part", (), "give at least one, such as 16")
    require(options.timeout_s > 0, "timeout_s", options.timeout_s, "must be positive")
    from nfnet_flax.programs.plan import devices_of, set_environment

    set_environment()  # before JAX looks for devices
    from nfnet_flax.claims import cost
    from nfnet_flax.claims.evidence import evidence

    for name in options.models:
        if name not in cost.RUNS:
            raise unknown_name("published run", name, cost.RUNS)
    names = tuple(dict.fromkeys(options.models)) or cost.RUNS
    topologies = tuple(dict.fromkeys(options.topologies))
    require(bool(topologies), "topologies", topologies, "give at least one, such as v5e:2x4")
    _check_kinds(topologies, {"rate": rates, "clock_ghz": clocks_ghz})
    recipes = [cost.recipe_of(name, count) for name in names for count in dict.fromkeys(options.images_per_part)]
    for topology in topologies:
        devices_of(topology)  # an error now, not after hours; and after all that needs no compiler
    out = made_folder("out", options.out)
    estimates = cost.study(recipes, topologies, out / "plans", options.timeout_s)
    data = cost.data_of(estimates, rates, {kind: 1e9 * value for kind, value in clocks_ghz.items()})
    found = evidence(cost.CLAIM, shlex.join(["nfnet", "claim", "cost", *argv]), data)
    conclude(found, out, cost.text(found))
    if all(estimate.compiled.plan is None for estimate in estimates):
        warn("no step was estimated: the table says why")
        return EXIT_WRONG
    return EXIT_DONE


def _numbers(field: str, words: Sequence[str]) -> dict[str, float]:
    """Kind of chip -> number, from words such as `v5e=1.5`.

    Raises:
      ConfigError: a word is of another form, or names a kind twice.
    """
    found: dict[str, float] = {}
    for word in words:
        kind, _, number = word.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        remedy = "give a kind of chip and a positive number, such as v5e=1.5, each kind once"
        require(bool(kind) and 0 < value < float("inf") and kind not in found, field, word, remedy)
        found[kind] = value
    return found


def _check_kinds(topologies: Sequence[str], given: dict[str, dict[str, float]]) -> None:
    """Raises `ConfigError` if a number is for a kind of chip that is not asked for: it would be ignored."""
    kinds = {topology.partition(":")[0] for topology in topologies}
    for field, numbers in given.items():
        for kind in numbers.keys() - kinds:
            raise ConfigError(
                f"{field}: {kind!r} is no kind of the given topologies, which are of {', '.join(sorted(kinds))}: give "
                "one of these, or --topologies of that kind"
            )
