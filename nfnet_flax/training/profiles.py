"""The profiles of a run: where they are put, and how they are asked for."""

from contextlib import AbstractContextManager

from nfnet_flax.parallel.processes import current
from nfnet_flax.telemetry.profiling import ProfileOptions, Profiler, profiling
from nfnet_flax.training import layout
from nfnet_flax.training.progress import Progress
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.setup import Setup

_LOOK_S = 1.0
_LOOK_IN_BUCKET_S = 30.0
"""Interval at which a thread of process 0 looks for the file that asks for a profile. In a bucket each look costs a
request."""


def profiling_of(
    setup: Setup, folder: RunFolder, options: ProfileOptions, progress: Progress, step: int
) -> AbstractContextManager[Profiler]:
    """What takes the profiles of a run that continues from a step; see `telemetry.profiling.profiling`."""
    return profiling(
        options,
        current(),
        folder.place,
        f"{layout.TENSORBOARD}/{layout.PROFILES}",
        start_step=step,
        num_steps=setup.num_steps,
        eval_every_steps=setup.recipe.eval_every_steps,
        say=progress.say,
        look_s=_LOOK_S if folder.mirror is None else _LOOK_IN_BUCKET_S,
    )
