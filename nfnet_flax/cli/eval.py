"""`nfnet eval`."""

import dataclasses

import tyro

from nfnet_flax.cli.accuracy import print_accuracy
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import local_path


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    @dataclasses.dataclass(frozen=True)
    class EvalOptions:
        workdir: str
        """Folder of the run."""

    options = tyro.cli(
        EvalOptions, args=argv, prog="nfnet eval", description="Evaluate the newest checkpoint of a run."
    )
    from nfnet_flax.runtime import prepare
    from nfnet_flax.training.reading import evaluate

    prepare()
    metrics = evaluate(local_path("workdir", options.workdir))
    print(f"step {metrics['step']:.0f}")
    print_accuracy(metrics)
    return EXIT_DONE
