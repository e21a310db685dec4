"""`nfnet claim cuts`."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro

from nfnet_flax.cli.options import COUNT, DIR, PIXELS, parsed
from nfnet_flax.config import require
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.json_files import write_named
from nfnet_flax.paths import made_folder
from nfnet_flax.plots import check_matplotlib

_PICTURE = "cuts.svg"
_COUNTS = tyro.conf.arg(metavar="N ...")


@dataclasses.dataclass(frozen=True)
class CutsOptions:
    """Normalizer-free against BatchNorm, by the cut of the batch.

    Trains NF-ResNet and BatchNorm ResNet on the digits that scikit-learn contains, with the same number of updates, in
    batches of 64 images that are cut into parts of fewer and fewer images; and with one cut on several numbers of CPU
    devices. Prints tables, and writes them with a picture. The same command continues what was stopped or killed.
    """

    out: Annotated[str, DIR] = "claims/cuts"
    """Folder for evidence.json, cuts.svg and the runs."""
    jobs: Annotated[int | None, COUNT] = None
    """Number of runs at the same time; without this option one for each core."""
    seeds: Annotated[int, COUNT] = 3
    """Number of seeds."""
    first_seed: Annotated[int, COUNT] = 0
    """The first of them."""
    steps: Annotated[int, COUNT] = 224
    """Number of updates of each run."""
    images_per_part: Annotated[tuple[int, ...], _COUNTS] = (64, 32, 16, 8, 4)
    """The cuts: the number of images of each part, powers of two."""
    devices: Annotated[tuple[int, ...], _COUNTS] = (1, 2, 4, 8)
    """Numbers of devices, powers of two."""
    image_size: Annotated[int, PIXELS] = 16
    """Height and width of the images."""
    widths: Annotated[tuple[int, ...], _COUNTS] = (32, 64)
    """Channels of the stages of both networks."""
    depths: Annotated[tuple[int, ...], _COUNTS] = (1, 1)
    """Residual blocks of the stages."""
    learning_rate: Annotated[float, tyro.conf.arg(metavar="X")] = 0.1
    """Peak of the learning rate."""
    clipping: Annotated[float, tyro.conf.arg(metavar="LAMBDA")] = 0.16
    """Lambda of adaptive gradient clipping for NF-ResNet; 0: no clipping."""
    picture: bool = True
    """Draw the picture (extra `plots`)."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(CutsOptions, argv, "nfnet claim cuts")
    require(options.seeds >= 1, "seeds", options.seeds, "must be at least 1")
    if options.picture:
        check_matplotlib("picture", "True")

    from nfnet_flax.claims import cuts
    from nfnet_flax.claims.cuts_measured import measure
    from nfnet_flax.claims.cuts_shown import picture, text
    from nfnet_flax.claims.evidence import evidence, write_evidence
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
    folder = made_folder("out", options.out)
    prepare(reproducible=True)
    results = cuts.run(study, folder, num_jobs=num_cores() if options.jobs is None else options.jobs)
    measured = measure(study, results, folder)
    command = shlex.join(["nfnet", "claim", "cuts", *argv])
    found = evidence("cuts", command, dataclasses.asdict(measured), runs_of(results.values()))
    written = [write_evidence(found, folder)]
    if options.picture:
        written.append(folder / _PICTURE)
        write_named("out", written[-1], picture(found, "svg"))
    print(text(found))
    print("\n" + "\n".join(f"written: {path}" for path in written))
    return EXIT_DONE
