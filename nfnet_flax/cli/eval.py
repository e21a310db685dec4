"""`nfnet eval`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from nfnet_flax.cli.accuracy import print_accuracy
from nfnet_flax.data.config import DataConfig
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import run_folder


@dataclasses.dataclass(frozen=True)
class Changeable:
    """What of a run's recipe an evaluation may change: where the images lie, or which they are."""

    data: DataConfig


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.cli import recipe_options
    from nfnet_flax.training.reading import evaluate

    given = recipe_options.read_changes("nfnet eval", argv, Changeable(data=_data_of_run(argv)))

    @dataclasses.dataclass(frozen=True)
    class EvalOptions:
        workdir: str
        """Folder of the run."""
        checkpoint: Literal["newest", "best"] | int = "newest"
        """The newest or the best good one, or that of a step."""
        data: Annotated[tyro.conf.AvoidSubcommands[DataConfig], tyro.conf.arg(name="data")] = given.config.data

    options = recipe_options.parse(EvalOptions, given, "Evaluate a checkpoint of a run on its held-out set.")
    metrics = evaluate(run_folder("workdir", options.workdir), checkpoint=options.checkpoint, data=options.data)
    print(f"step {metrics['step']:.0f}")
    print_accuracy(metrics)
    return EXIT_DONE


def _data_of_run(argv: list[str]) -> DataConfig:
    """The settings that options change; looked for ahead of them. Any, for help, where no folder is given."""
    from nfnet_flax.cli import recipe_options
    from nfnet_flax.training.reading import Run

    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--workdir":
            return Run(value if equals else following).recipe.data
    return recipe_options.example().data
