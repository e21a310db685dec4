"""`nfnet claim agc`."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro

from nfnet_flax.cli.claim_output import Picture, check_picture, conclude
from nfnet_flax.cli.options import COUNT, DIR, parsed
from nfnet_flax.config import require_count
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import made_folder

_INCHES = 14.0, 5.0
"""Width and height of the picture."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.claims import agc

    @dataclasses.dataclass(frozen=True)
    class AgcOptions:
        """What clipping does for batch size and learning rate (arXiv 2102.06171, figure 2).

        Trains a small ResNet with BatchNorm and a small NF-ResNet (a ResNet without normalization layers) on the
        digits that scikit-learn contains, strongly augmented. The NF-ResNet trains without clipping, with AGC (adaptive
        gradient clipping, which limits the gradient of each unit of a layer to lambda times the norm of its
        parameters), and with clipping by the norm of the whole gradient. The learning rate grows linearly with the
        batch size. Prints tables, and writes them with a picture. The 144 runs of the default take about 35 minutes on
        two cores that nothing else uses. The same command continues what was stopped or killed.
        """

        out: Annotated[str, DIR] = "claims/agc"
        """Folder for evidence.json, agc.svg and the runs."""
        jobs: Annotated[int | None, COUNT] = None
        """Number of runs at the same time; without this option one for each core."""
        picture: bool = True
        """Draw the picture (extra `plots`)."""
        study: Annotated[agc.Study, tyro.conf.arg(name="")] = dataclasses.field(default_factory=agc.Study)

    options = parsed(AgcOptions, argv, "nfnet claim agc")
    if options.jobs is not None:
        require_count("jobs", options.jobs)
    recipes = agc.recipes(options.study)
    agc.check_batches(options.study)
    if options.picture:
        check_picture()

    from nfnet_flax.claims.agc_shown import agc_picture, agc_text
    from nfnet_flax.claims.evidence import evidence
    from nfnet_flax.claims.study import num_cores, run_study, runs_of
    from nfnet_flax.plots import picture_file

    folder = made_folder("out", options.out)
    num_jobs = num_cores() if options.jobs is None else options.jobs
    # On CPUs, as many at a time as there are cores: a GPU could not be shared by processes.
    variables = {name: {"JAX_PLATFORMS": "cpu"} for name in recipes}
    results = run_study(recipes, folder / "runs", num_jobs=num_jobs, variables=variables)
    command = shlex.join(["nfnet", "claim", "agc", *argv])
    found = evidence("agc", command, agc.measured(options.study, results), runs_of(results.values()))
    picture = Picture("agc.svg", lambda: picture_file(agc_picture(found, *_INCHES), "svg"))
    conclude(found, folder, agc_text(found), picture if options.picture else None)
    return EXIT_DONE
