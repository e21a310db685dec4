"""`nfnet train`."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nfnet_flax import IMPORTED_AT_S
from nfnet_flax.cli.accuracy import print_accuracy
from nfnet_flax.cli.ahead import Code
from nfnet_flax.cli.errors import explain
from nfnet_flax.cli.options import DIR
from nfnet_flax.exit_codes import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED
from nfnet_flax.verbosity import is_quiet, stamp

if TYPE_CHECKING:
    from nfnet_flax.training.loop import TrainResult


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.cli import recipe_options
    from nfnet_flax.parallel.processes import DistributedConfig
    from nfnet_flax.recipe import Recipe
    from nfnet_flax.telemetry.profile_steps import parse_steps
    from nfnet_flax.training.run_folder import place_of
    from nfnet_flax.training.watchdog import WatchdogConfig

    given = recipe_options.read("train", argv)

    @dataclasses.dataclass(frozen=True)
    class TrainOptions:
        workdir: Annotated[str, DIR]
        """Folder of the run: a path, or gs://BUCKET/FOLDER or s3://BUCKET/FOLDER. A new folder is created; a run that
        is in it already is continued."""
        debug: bool = "--debug" in argv
        """Train four steps of a small network of the family on noise; other options then change this small recipe."""
        distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
        """The processes of the run."""
        watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
        """How long the run may make no progress."""
        profile_steps: Annotated[str, tyro.conf.arg(metavar="FIRST:END")] | None = None
        """Take a profile of these steps for XProf: 100:103 are the steps 100, 101 and 102. Give it to all processes. A
        profile of a running job: touch DIR/profile_now, or send SIGUSR2 to a process."""
        code: Code = ()
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = given.config

    chosen = recipe_options.parse(TrainOptions, given, "Train a network, or continue the run in a folder.")
    place_of("workdir", chosen.workdir)  # before anything slow: it may be mistyped
    workdir = chosen.workdir
    profile_steps = None if chosen.profile_steps is None else parse_steps(chosen.profile_steps)

    from nfnet_flax.parallel.processes import current
    from nfnet_flax.runtime import prepare
    from nfnet_flax.training.launch import run_together
    from nfnet_flax.training.loop import TrainingDiverged, train
    from nfnet_flax.training.watchdog import Watchdog

    prepare(reproducible=chosen.recipe.execution.reproducible)

    def train_watched(watchdog: Watchdog) -> int:
        try:
            result = train(
                chosen.recipe,
                workdir,
                watchdog,
                profile_steps=profile_steps,
                show_progress=not is_quiet(),
                started_at_s=IMPORTED_AT_S,
                start_timeout_s=chosen.distributed.start_timeout_s,
                owns_process=True,
            )
        except TrainingDiverged as error:  # in all processes, as the loss is that of the whole batch
            if current().is_first:
                print(f"{stamp()}nfnet: diverged: {error}", file=sys.stderr)
            return EXIT_DIVERGED
        if current().is_first:
            _print_result(result, str(place_of("workdir", workdir)))
        return EXIT_DONE if result.finished else EXIT_STOPPED

    return run_together(chosen.distributed, chosen.watchdog, train_watched, explain)


def _print_result(result: "TrainResult", workdir: str) -> None:
    if not result.finished:
        print(f"stopped at step {result.step} of {result.num_steps}; run the same command again to continue")
        return
    print(f"finished: {result.num_steps} steps")
    print_accuracy(result.metrics)
    print(f"checkpoints: {workdir}/checkpoints (newest), {workdir}/best (best)")
    logdir = shlex.quote(f"{workdir}/tensorboard")
    if "://" in workdir:
        print(f"curves: tensorboard --logdir {logdir}, without TensorFlow: see docs/telemetry.md")
    elif any(Path(workdir, "tensorboard").glob("events*")):  # not only profiles
        print(f"curves: tensorboard --logdir {logdir}")
