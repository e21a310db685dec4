"""`nfnet eval`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from nfnet_flax.cli.accuracy import print_accuracy
from nfnet_flax.cli.ahead import Code, load_given_code, values_of
from nfnet_flax.data.config import DataConfig
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import run_folder


@dataclasses.dataclass(frozen=True)
class Changeable:
    """The part of a run's recipe that an evaluation may change: where the images are, and which they are."""

    data: DataConfig


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.cli import recipe_options
    from nfnet_flax.training.reading import evaluate

    load_given_code(argv)
    given = recipe_options.read_changes("nfnet eval", argv, Changeable(data=_data_of_run(argv)))

    @dataclasses.dataclass(frozen=True)
    class EvalOptions:
        workdir: str
        """Folder of the run."""
        checkpoint: Literal["newest", "best"] | int = "newest"
        """Which checkpoint to evaluate: the newest or the best undamaged one, or the number of a step."""
        code: Code = ()
        data: Annotated[tyro.conf.AvoidSubcommands[DataConfig], tyro.conf.arg(name="data")] = given.config.data

    options = recipe_options.parse(EvalOptions, given, "Evaluate a checkpoint of a run on its held-out set.")
    metrics = evaluate(run_folder("workdir", options.workdir), checkpoint=options.checkpoint, data=options.data)
    print(f"step {metrics['step']:.0f}")
    print_accuracy(metrics)
    return EXIT_DONE


def _data_of_run(argv: list[str]) -> DataConfig:
    """The data settings of the run, which the options change; the defaults if no folder is given, as for help."""
    from nfnet_flax.cli import recipe_options
    from nfnet_flax.training.reading import Run

    for workdir in values_of("--workdir", argv):
        return Run(workdir).recipe.data
    return recipe_options.example().data
