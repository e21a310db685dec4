"""`nfnet claim agc`."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro

from nfnet_flax.cli.options import COUNT, DIR, parsed
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.json_files import write_named
from nfnet_flax.paths import made_folder
from nfnet_flax.plots import check_matplotlib, picture_file

_PICTURE = "agc.svg"
_INCHES = 14.0, 5.0
"""Width and height of the picture."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.claims import agc

    @dataclasses.dataclass(frozen=True)
    class AgcOptions:
        """What clipping does for batch size and learning rate (arXiv 2102.06171, figure 2).

        Trains a small BatchNorm ResNet and a small NF-ResNet without clipping, with AGC, and with clipping by the norm
        of the whole gradient, on the digits that scikit-learn contains, strongly augmented. The learning rate grows
        linearly with the batch size. Prints tables, and writes them with a picture. The same command continues what
        was stopped or killed.
        """

        out: Annotated[str, DIR] = "claims/agc"
        """Folder for evidence.json, agc.svg and the runs."""
        jobs: Annotated[int | None, COUNT] = None
        """Number of runs at the same time; without this option one for each core."""
        picture: bool = True
        """Draw the picture (extra `plots`)."""
        study: Annotated[agc.Study, tyro.conf.arg(name="")] = dataclasses.field(default_factory=agc.Study)

    options = parsed(AgcOptions, argv, "nfnet claim agc")
    if options.picture:
        check_matplotlib("picture", "True")
    folder = made_folder("out", options.out)

    from nfnet_flax.claims.agc_shown import agc_picture, agc_text
    from nfnet_flax.claims.evidence import evidence, write_evidence
    from nfnet_flax.claims.study import num_cores, run_study, runs_of

    num_jobs = num_cores() if options.jobs is None else options.jobs
    recipes = agc.recipes(options.study)
    # On CPUs, as many at a time as there are cores: a GPU could not be shared by processes.
    variables = {name: {"JAX_PLATFORMS": "cpu"} for name in recipes}
    results = run_study(recipes, folder / "runs", num_jobs=num_jobs, variables=variables)
    command = shlex.join(["nfnet", "claim", "agc", *argv])
    found = evidence("agc", command, agc.measured(options.study, results), runs_of(results.values()))
    written = [write_evidence(found, folder)]
    if options.picture:
        written.append(folder / _PICTURE)
        write_named("out", written[-1], picture_file(agc_picture(found, *_INCHES), "svg"))
    print(f"{agc_text(found)}\n")
    print("\n".join(f"written: {path}" for path in written))
    return EXIT_DONE
