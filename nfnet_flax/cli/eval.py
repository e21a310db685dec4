"""`nfnet eval`."""

import dataclasses
from pathlib import Path

import tyro

from nfnet_flax.cli.accuracy import print_accuracy
from nfnet_flax.exit_codes import EXIT_DONE


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    @dataclasses.dataclass(frozen=True)
    class EvalOptions:
        workdir: Path
        """Folder of the run."""

    options = tyro.cli(
        EvalOptions, args=argv, prog="nfnet eval", description="Evaluate the newest checkpoint of a run."
    )
    from nfnet_flax.runtime import prepare
    from nfnet_flax.training.reading import evaluate

    prepare()
    metrics = evaluate(options.workdir)
    print(f"step {metrics['step']:.0f}")
    print_accuracy(metrics)
    return EXIT_DONE
