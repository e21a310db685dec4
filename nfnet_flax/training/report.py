"""Passes on what the loop does: to the metrics on disk, other trackers, the record of times, and the terminal."""

import contextlib
import dataclasses
from collections.abc import Iterator

from nfnet_flax.telemetry.ledger import Category, Ledger
from nfnet_flax.telemetry.profiling import ProfileOptions, Profiler
from nfnet_flax.telemetry.tracking import Tracking
from nfnet_flax.training.activity import Activity
from nfnet_flax.training.checkpoint import Kind
from nfnet_flax.training.gradient import Metrics
from nfnet_flax.training.log_step import LogStep
from nfnet_flax.training.metrics import MetricsLog, NoMetrics, OnMetrics
from nfnet_flax.training.profiles import profiling_of
from nfnet_flax.training.progress import Progress
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.setup import Setup
from nfnet_flax.training.showing import open_log, unshown
from nfnet_flax.training.watchdog import Phase
from nfnet_flax.training.window import Window
from nfnet_flax.verbosity import stamp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listeners:
    """To whom this process reports, by the arguments of `train`."""

    is_shown: bool
    """Whether this process prints what it does."""
    on_metrics: OnMetrics | None
    """Called with the metrics of a step."""
    profiles: ProfileOptions
    """What is profiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop calls when it has done something; made by `reporting`."""

    activity: Activity
    trackers: Tracking
    log: MetricsLog | NoMetrics
    log_step: LogStep
    progress: Progress
    profiler: Profiler
    window: Window
    best_metric: str

    def enter(self, phase: Phase, step: int, category: Category | None = None) -> None:
        """From now on the loop does this; see `Activity.enter`."""
        self.activity.enter(phase, step, category)

    def stepped(self, step: int, metrics: Metrics) -> None:
        """A step was begun; its metrics stay on the devices until a log step."""
        self.window.push(step, metrics)
        self.profiler.step(step, metrics)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The held-out set was evaluated."""
        self.log.write(step, metrics)
        self.activity.ledger.record("evaluated", step)
        self.progress.evaluated(step, metrics, self.best_metric)

    def saved(self, step: int, kind: Kind) -> None:
        """The writing of a checkpoint was begun."""
        self.activity.ledger.record("saved", step, kind=kind)
        if kind == "checkpoints":
            self.progress.saved(step)

    def ends(self, step: int, metrics: dict[str, float], reason: str | None, *, finished: bool) -> None:
        """The session ends; `reason` says why the run was asked to stop, if it was."""
        if reason is not None:
            self.progress.say(f"stopping at step {step}: {reason}")
        if finished:
            self.activity.ledger.ends("finished")
            self.trackers.ends("finished", step, metrics)
        else:
            self.activity.ledger.ends("stopped", reason=str(reason))
            self.trackers.ends("stopped", step, metrics, str(reason))


@contextlib.contextmanager
def reporting(
    setup: Setup,
    folder: RunFolder,
    listeners: Listeners,
    trackers: Tracking,
    activity: Activity,
    step: int,
    *,
    evaluated: bool,
) -> Iterator[Report]:
    """Opens the metrics, trackers, progress and profiler of a run; leaving the context closes them.

    Args:
      setup: result of `assemble`.
      folder: folder of the run.
      listeners: to whom this process reports besides.
      trackers: other places that show the metrics.
      activity: the watchdog and the record of times.
      step: the step from which the run continues.
      evaluated: whether the evaluation that is due at this step is done.

    Raises:
      StorageFailed: the metrics cannot be written.
    """

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        trackers.on_metrics(step, metrics)
        if listeners.on_metrics is not None:
            listeners.on_metrics(step, metrics)

    recipe = setup.recipe
    with contextlib.ExitStack() as opened:
        log = open_log(folder.path, setup, step, evaluated=evaluated, on_metrics=on_metrics)
        opened.callback(log.close)
        trackers.begin(step)
        progress = Progress(
            num_steps=setup.num_steps,
            batch_size=recipe.data.batch_size,
            start_step=step,
            is_shown=listeners.is_shown,
        )
        opened.callback(progress.close)
        profiler = opened.enter_context(profiling_of(setup, folder, listeners.profiles, progress, step))
        log_step = LogStep(setup, log, activity.ledger, progress, folder.path, step)
        opened.callback(log_step.flush)
        if (text := unshown(setup, log)) is not None:
            progress.say(text)
        if step < setup.num_steps:
            progress.say("compiling the step, or reading it from the cache of compiled programs")
        yield Report(
            activity=activity,
            trackers=trackers,
            log=log,
            log_step=log_step,
            progress=progress,
            profiler=profiler,
            window=Window(setup, log, progress, log_step, step),
            best_metric=recipe.checkpoint.best_metric,
        )


def print_start(ledger: Ledger, joined_s: float) -> None:
    """Prints how long a start took; the time of the first step is printed when that step is done.

    Args:
      ledger: the record of times.
      joined_s: seconds until the processes were connected.
    """
    spent = ledger.totals()
    print(
        f"{stamp()}ready {sum(spent.values()):.1f} s after the start: imports and joining {joined_s:.1f} s, "
        f"data and folder {spent['start'] - joined_s:.1f} s, state {spent['restore'] + spent['compile']:.1f} s",
        flush=True,
    )
