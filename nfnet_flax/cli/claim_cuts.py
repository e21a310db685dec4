"""`nfnet claim cuts`."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated

from nfnet_flax.cli.claim_output import Picture, check_picture, conclude
from nfnet_flax.cli.options import COUNT, COUNTS, DIR, NUMBER, PIXELS, parsed
from nfnet_flax.config import require, require_count
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import made_folder


@dataclasses.dataclass(frozen=True)
class CutsOptions:
    """Normalizer-free against BatchNorm, by the cut of the batch: into how many parts it is divided, which are computed
    one after the other or on several devices.

    Trains NF-ResNet (a ResNet without normalization layers) and a ResNet with BatchNorm on the digits that scikit-learn
    contains, with the same number of updates, in batches of 64 images that are cut into parts of fewer and fewer
    images; and with one cut on several numbers of CPU devices. Prints tables, and writes them with a picture. The 36
    runs of the default take 10 to 20 minutes on two cores. The same command continues what was stopped or killed.
    """

    out: Annotated[str, DIR] = "claims/cuts"
    """Folder for evidence.json, cuts.svg and the runs."""
    jobs: Annotated[int | None, COUNT] = None
    """Number of runs at the same time; without this option one for each core."""
    seeds: Annotated[int, COUNT] = 3
    """Number of seeds."""
    first_seed: Annotated[int, COUNT] = 0
    """The first seed; the others are the next ones."""
    steps: Annotated[int, COUNT] = 224
    """Number of updates of each run."""
    images_per_part: Annotated[tuple[int, ...], COUNTS] = (64, 32, 16, 8, 4)
    """The cuts: numbers of images in each part of a batch, powers of two."""
    devices: Annotated[tuple[int, ...], COUNTS] = (1, 2, 4, 8)
    """Numbers of CPU devices over which one of the cuts is divided, powers of two."""
    image_size: Annotated[int, PIXELS] = 16
    """Height and width of the images."""
    widths: Annotated[tuple[int, ...], COUNTS] = (32, 64)
    """Channels of the stages of both networks."""
    depths: Annotated[tuple[int, ...], COUNTS] = (1, 1)
    """Residual blocks of the stages."""
    learning_rate: Annotated[float, NUMBER] = 0.1
    """Peak of the learning rate."""
    clipping: Annotated[float, NUMBER] = 0.16
    """Lambda of AGC (adaptive gradient clipping) for NF-ResNet: the largest ratio of the norm of a gradient to that of
    its parameters; 0: no clipping."""
    picture: bool = True
    """Draw the picture (extra `plots`)."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(CutsOptions, argv, "nfnet claim cuts")
    require(options.seeds >= 1, "seeds", options.seeds, "must be at least 1")
    if options.jobs is not None:
        require_count("jobs", options.jobs)

    from nfnet_flax.claims import cuts
    from nfnet_flax.claims.cuts_measured import measure
    from nfnet_flax.claims.cuts_shown import picture, text
    from nfnet_flax.claims.evidence import evidence
    from nfnet_flax.claims.study import num_cores, runs_of
    from nfnet_flax.runtime import prepare

    study = cuts.Study(
        images_per_part=options.images_per_part,
        devices=options.devices,
        seeds=tuple(range(options.first_seed, options.first_seed + options.seeds)),
        steps=options.steps,
        image_size=options.image_size,
        widths=options.widths,
        depths=options.depths,
        learning_rate=options.learning_rate,
        clipping=options.clipping,
    )
    cuts.recipes(study)  # an error now, before anything is written
    if options.picture:
        check_picture()
    folder = made_folder("out", options.out)
    prepare(reproducible=True)
    results = cuts.run(study, folder, num_jobs=num_cores() if options.jobs is None else options.jobs)
    measured = measure(study, results, folder)
    command = shlex.join(["nfnet", "claim", "cuts", *argv])
    found = evidence("cuts", command, dataclasses.asdict(measured), runs_of(results.values()))
    conclude(
        found, folder, text(found), Picture("cuts.svg", lambda: picture(found, "svg")) if options.picture else None
    )
    return EXIT_DONE
