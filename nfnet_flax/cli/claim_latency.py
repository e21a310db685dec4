"""`nfnet claim latency`."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from nfnet_flax.cli.claim_output import Picture, check_picture, conclude
from nfnet_flax.cli.options import COUNT, DIR, NAMES, PIXELS, SECONDS, parsed
from nfnet_flax.config import ConfigError, require, require_count, unknown_name
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG
from nfnet_flax.messages import warn
from nfnet_flax.models.layers import ComputeDtype
from nfnet_flax.paths import made_folder

if TYPE_CHECKING:
    from pathlib import Path

    from nfnet_flax.claims.latency import Step

_OF_ESTIMATES: tuple[str, ...] = "topologies", "images_at_a_time", "jobs", "timeout_s"
_OF_MEASUREMENTS: tuple[str, ...] = "rounds", "compute_dtype", "image_size"
"""Options that the other way to find a time does not have."""
_INCHES_PER_PLACE, _INCHES_HIGH = 5.0, 4.2


@dataclasses.dataclass(frozen=True)
class LatencyOptions:
    """The time of a training step of NFNets and EfficientNets beside that of EfficientNet-B7, as in figure 1 and
    table 3 of arXiv 2102.06171.

    Without --measure it is the estimate of the TPU compiler (extra `tpu`; no TPU is needed), for each topology (kind
    and grid of TPU chips, such as v3:2x2); with it, it is measured on the devices of this machine. NFNets train with
    AGC (adaptive gradient clipping), F6 also with SAM (sharpness-aware minimization, which computes two gradients
    for each update). Prints tables, and writes them with a picture of the published accuracy over the time. Estimates
    of F0 to F3 and B0 to B7 take about an hour of one core, those of F4 to F6 hours more. The same command continues
    what was stopped or killed.
    """

    models: Annotated[tuple[str, ...], NAMES] = ()
    """Networks: nfnet_f0 ... nfnet_f6, efficientnet_b0 ... efficientnet_b7; without this option all of them.
    efficientnet_b7 is always one of them."""
    images: Annotated[int, COUNT] = 32
    """Number of images of each device. If they do not fit, they are computed in two or four parts, one after the other,
    and then with rematerialization: activations are computed a second time instead of being kept."""
    images_at_a_time: Annotated[tuple[tuple[str, int], ...], tyro.conf.arg(metavar="NAME IMAGES ...")] = ()
    """Estimate: for some networks the largest number of these images that are computed at a time, a divisor of
    --images, such as nfnet_f4 16 nfnet_f5 8. It saves the compilation of steps that are known not to fit."""
    topologies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOPOLOGY ...")] = ("v3:2x2",)
    """Estimate: kinds and grids of TPU chips, such as v3:2x2 v5e:2x4 v6e:2x4."""
    jobs: Annotated[int, COUNT] = 1
    """Estimate: number of compilations at the same time. The largest networks take more than 10 GB of memory each."""
    timeout_s: Annotated[float, SECONDS] = 7200.0
    """Estimate: time limit of one compilation."""
    measure: bool = False
    """Measure on the devices of this machine."""
    rounds: Annotated[int, COUNT] = 9
    """Measure: number of timed steps of each network."""
    compute_dtype: ComputeDtype = "bfloat16"
    """Measure: type of the computation."""
    image_size: Annotated[int | None, PIXELS] = None
    """Measure: height and width of all images, in pixels; without this option the published sizes."""
    out: Annotated[str, DIR] = "claims/latency"
    """Folder for evidence.json, latency.svg, and a file of each compilation or measurement. With --measure, it also
    keeps the compiled programs, so that a pair of networks whose measurement was stopped begins anew, but quicker."""
    picture: bool = True
    """Draw the picture (extra `plots`)."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(LatencyOptions, argv, "nfnet claim latency")
    require_count("images", options.images, most=4096)
    for name, number in options.images_at_a_time:
        require_count(f"images_at_a_time {name}", number, most=options.images)
        remedy = f"must divide images {options.images}"
        require(options.images % number == 0, f"images_at_a_time {name}", number, remedy)
    require_count("jobs", options.jobs, most=4096)
    require_count("rounds", options.rounds, most=4096)
    require(options.timeout_s > 0, "timeout_s", options.timeout_s, "must be positive")
    require(bool(options.topologies), "topologies", (), "give at least one, such as v3:2x2")
    if options.image_size is not None:
        require_count("image_size", options.image_size, most=4096)
    _check_apply(options)
    from nfnet_flax.claims import latency, latency_shown
    from nfnet_flax.claims.evidence import evidence
    from nfnet_flax.plots import picture_file

    for name in (*options.models, *dict(options.images_at_a_time)):
        if name not in latency.NETWORKS:
            raise unknown_name("network", name, latency.NETWORKS, listed_by="nfnet claim latency --help")
    if not options.measure:
        _check_topologies(options.topologies)
    if options.picture:
        check_picture()
    chosen = options.models or latency.NETWORKS
    names = tuple(name for name in latency.NETWORKS if name in chosen or name == latency.REFERENCE)
    folder = made_folder("out", options.out)
    steps = _measured(options, names, folder) if options.measure else _estimated(options, names, folder)
    found = evidence(latency.CLAIM, shlex.join(["nfnet", "claim", "latency", *argv]), latency.data_of(steps))
    width = _INCHES_PER_PLACE * len({step.place for step in steps})
    picture = Picture("latency.svg", lambda: picture_file(latency_shown.picture(found, width, _INCHES_HIGH), "svg"))
    conclude(found, folder, latency_shown.text(found), picture if options.picture else None)
    if all(step.problem for step in steps):
        warn(f"no step was {'measured' if options.measure else 'estimated'}: the table says why")
        return EXIT_WRONG
    return EXIT_DONE


def _check_apply(options: LatencyOptions) -> None:
    """Refuses options that would be ignored."""
    ignored = _OF_ESTIMATES if options.measure else _OF_MEASUREMENTS
    remedy = "is for measurements: leave it out, or give --measure, too"
    if options.measure:
        remedy = "is for estimates: leave it out with --measure"
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        require(field.name not in ignored or value == field.default, field.name, value, remedy)


def _check_topologies(topologies: Sequence[str]) -> None:
    """An error now, not after hours."""
    from nfnet_flax.claims.compiled_step import libtpu_version
    from nfnet_flax.programs.plan import devices_of, set_environment

    set_environment()  # before JAX looks for devices
    try:
        for topology in topologies:
            devices_of(topology)
    except ConfigError as error:
        if libtpu_version():
            raise
        other = "or measure on the devices of this machine, which needs no libtpu: --measure"
        raise ConfigError(f"{error}; {other}") from error


def _estimated(options: LatencyOptions, names: Sequence[str], folder: "Path") -> "list[Step]":
    from nfnet_flax.claims.latency import estimated_steps

    topologies = tuple(dict.fromkeys(options.topologies))
    return estimated_steps(
        names,
        topologies,
        folder / "plans",
        images=options.images,
        at_a_time=dict(options.images_at_a_time),
        num_jobs=options.jobs,
        timeout_s=options.timeout_s,
    )


def _measured(options: LatencyOptions, names: Sequence[str], folder: "Path") -> "list[Step]":
    from nfnet_flax.claims.latency import REFERENCE
    from nfnet_flax.claims.latency_pair import Measurement, measured_steps

    measurements = [
        Measurement(
            reference=REFERENCE,
            network=name,
            images=options.images,
            rounds=options.rounds,
            compute_dtype=options.compute_dtype,
            image_size=options.image_size,
        )
        for name in names
    ]
    return measured_steps(measurements, folder / "measured")
