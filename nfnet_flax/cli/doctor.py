"""`nfnet doctor`."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated

import tyro

from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.options import DIR, SECONDS, parsed
from nfnet_flax.config import require
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG

_MAX_TIMEOUT_S = 86_400
_DESCRIPTION = "Say what is wrong. Changes nothing, but writes a small object to a bucket and deletes it again."


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    """Keeps Python from writing `__pycache__` beside the user's files."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@_without_bytecode()
def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    @dataclasses.dataclass(frozen=True)
    class DoctorOptions:
        workdir: Annotated[str | None, DIR] = None
        """Folder of a run, or its URL in a bucket; the run need not have begun."""
        recipe: Annotated[str | None, tyro.conf.arg(metavar="RECIPE.py")] = None
        """Recipe file, with its arguments; by default the recipe that is stored in the workdir."""
        timeout_s: Annotated[float, SECONDS] = 60.0
        """Longest time to wait for a disk or a device that does not answer, in seconds."""
        all_images: bool = False
        """Also read and decode every image of both splits, and name each that is damaged. `--timeout-s` is then the
        longest time without any progress."""
        report: bool = False
        """Print the findings, versions, device and recipe as a text for a public issue, without paths, names of users,
        hosts and buckets, addresses and tokens."""
        code: Code = ()

    options = parsed(DoctorOptions, argv, "nfnet doctor", _DESCRIPTION)
    remedy = f"must be positive and at most {_MAX_TIMEOUT_S:,}"
    require(0 < options.timeout_s <= _MAX_TIMEOUT_S, "timeout_s", options.timeout_s, remedy)
    load_given_code(argv)
    from nfnet_flax.doctor import describe, examine
    from nfnet_flax.doctor.issue import report
    from nfnet_flax.recipe import Recipe
    from nfnet_flax.training.run_folder import place_of

    place = None if options.workdir is None else place_of("workdir", options.workdir)

    found, recipes = [], list[Recipe]()
    checks = examine(place, options.recipe, timeout_s=options.timeout_s, all_images=options.all_images, recipes=recipes)
    for topic, findings in checks:
        found.append((topic, findings))
        if not options.report:
            print(describe(topic, findings), flush=True)
    num_wrong = sum(finding.is_wrong for _, findings in found for finding in findings)
    verdict = f"{num_wrong} wrong, as marked above" if num_wrong else "nothing is wrong"
    if options.report:
        given = (options.workdir, options.recipe, *options.code)
        verdict = report(found, verdict, recipes[0] if recipes else None, given=given)
    print(verdict)
    return EXIT_WRONG if num_wrong else EXIT_DONE
