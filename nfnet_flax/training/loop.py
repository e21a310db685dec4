"""The training loop. It only calls the other parts in order, and is meant to be read from top to bottom."""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from nfnet_flax.config import require
from nfnet_flax.data.classes import spare_outputs
from nfnet_flax.data.pipeline import say_unused, train_batches
from nfnet_flax.data.prefetch import Batches
from nfnet_flax.exit_codes import EXIT_LOST
from nfnet_flax.messages import warn
from nfnet_flax.optim import groups_table
from nfnet_flax.output import guarded_output
from nfnet_flax.parallel.mesh import to_global
from nfnet_flax.parallel.processes import check_platform, current
from nfnet_flax.progress import hidden, showing, track
from nfnet_flax.recipe import Recipe, with_absolute_paths
from nfnet_flax.runtime import check_deterministic, prepare
from nfnet_flax.telemetry.ledger import Ledger
from nfnet_flax.telemetry.peaks import peak_of
from nfnet_flax.telemetry.profiling import ProfileOptions
from nfnet_flax.training import checkpoint, layout
from nfnet_flax.training.activity import Activity
from nfnet_flax.training.copies import check_copies
from nfnet_flax.training.evaluation import run_evaluation, weights_to_evaluate
from nfnet_flax.training.fingerprints import fingerprints
from nfnet_flax.training.identity import check_same_run, claim
from nfnet_flax.training.initial import check_same_start, initial_weights
from nfnet_flax.training.lease import Lease, LeaseLost, owning
from nfnet_flax.training.metrics import OnMetrics
from nfnet_flax.training.preemption import StopPoint, stop_requests
from nfnet_flax.training.record import fixed_class_names
from nfnet_flax.training.report import Listeners, Report, print_start, reporting
from nfnet_flax.training.restoring import Notes, restore_newest
from nfnet_flax.training.run_folder import RunFolder, place_of
from nfnet_flax.training.run_folder import opened as open_folder
from nfnet_flax.training.run_log import logged
from nfnet_flax.training.saving import Saver, make_notes, noted_metrics, publishing, saving
from nfnet_flax.training.setup import Setup, assemble, facts_of
from nfnet_flax.training.showing import observer, show_first_batch
from nfnet_flax.training.state import TrainState
from nfnet_flax.training.tracked import tracked
from nfnet_flax.training.watchdog import Watchdog, WatchdogConfig
from nfnet_flax.training.window import TrainingDiverged as TrainingDiverged
from nfnet_flax.verbosity import stamp


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    """Number of updates done so far, including earlier calls."""
    num_steps: int
    """Number of updates of the whole run."""
    metrics: dict[str, float]
    """Metrics of the newest evaluation; empty if there was none."""
    finished: bool
    """False if the run was asked to stop, also if this was during the last evaluation; the same call continues it."""


@guarded_output(goes_on=True)
def train(
    recipe: Recipe,
    workdir: str | Path,
    watchdog: Watchdog | None = None,
    *,
    on_metrics: OnMetrics | None = None,
    profile_steps: range | None = None,
    show_progress: bool = False,
    started_at_s: float | None = None,
    start_timeout_s: float = 300.0,
    owns_process: bool = False,
) -> TrainResult:
    """Trains until the recipe's last step or a signal to stop; continues from the newest checkpoint in `workdir`.

    The order within the loop is guaranteed: evaluate if due, save if due, next batch, step, push metrics. So a
    checkpoint at step N means that everything due at N is done, and a state that is not finite is never saved.

    Args:
      recipe: the run.
      workdir: folder of the run, which all processes can access: a path, or a URL such as `gs://BUCKET/FOLDER`.
      watchdog: is notified of what the loop is doing; None: there is no watchdog.
      on_metrics: called in process 0 with the step and the metrics of each log step and evaluation, when they are
        written; an error that it raises ends the run.
      profile_steps: steps of which a profile is taken, counted from 1; the same in all processes. None: only when the
        file `profile_now` appears in the folder of the run, or a process receives SIGUSR2.
      show_progress: whether to show what the run does: lines on stdout, and progress on stderr. Otherwise only warnings
        are printed (`messages.py`).
      started_at_s: when the program started, by `time.perf_counter`, for the message that says how long the start took;
        None: the time of this call.
      start_timeout_s: how long processes wait for one another before the first step, in seconds.
      owns_process: whether a second signal to stop ends the process at once, as for a command; otherwise a second
        Ctrl-C raises `KeyboardInterrupt`, and a notebook's kernel continues.

    Raises:
      ConfigError: the recipe does not fit the devices or the folder, another process trains in the folder, the input
        differs from before, or an image cannot be decoded.
      InputFailed: the input failed for another reason: a worker died or is stuck, or a file cannot be read.
      StorageFailed: a checkpoint or the metrics cannot be written.
      LeaseLost: another process took over the folder, because this one was suspended for a long time.
      CopiesDiffer: devices or processes hold different copies of the state.
      TrainingDiverged: the loss or a gradient is not finite.
    """
    require(isinstance(recipe, Recipe), "recipe", recipe, "give a Recipe; nfnet_flax.load_recipe(file) makes one")
    require(watchdog is None or isinstance(watchdog, Watchdog), "watchdog", watchdog, "give a Watchdog, or None")
    profiles = ProfileOptions(profile_steps)
    activity = Activity(watchdog or Watchdog(WatchdogConfig()), Ledger(started_at_s or time.perf_counter()))
    joined_s = activity.ledger.totals()["start"]
    prepare(reproducible=recipe.execution.reproducible)
    recipe, place = with_absolute_paths(recipe), place_of("workdir", workdir)
    if isinstance(place, Path):
        recipe.data.source.check_outside("workdir", place)
    processes = current()
    check_same_run(processes, recipe, str(place), start_timeout_s, profile_steps=str(profile_steps))
    check_platform(recipe.platform)  # only for training: a run may be evaluated on any device
    if recipe.execution.reproducible:
        check_deterministic()
    listeners = Listeners(is_shown=show_progress and processes.is_first, on_metrics=on_metrics, profiles=profiles)
    with contextlib.ExitStack() as opened:
        opened.enter_context(showing() if listeners.is_shown else hidden())
        others = {signal.SIGUSR2: profiles.signalled.set}
        stop = opened.enter_context(stop_requests(processes, owns_process=owns_process, others=others))
        folder = opened.enter_context(open_folder("workdir", workdir, is_first=processes.is_first))
        return _train_in(folder, recipe, stop, activity, listeners, start_timeout_s, joined_s)


def _train_in(
    folder: RunFolder,
    recipe: Recipe,
    stop: StopPoint,
    activity: Activity,
    listeners: Listeners,
    start_timeout_s: float,
    joined_s: float,
) -> TrainResult:
    """Takes possession of the folder, makes or restores the state, and runs the loop."""
    processes, ledger = current(), activity.ledger
    with contextlib.ExitStack() as opened:
        if processes.is_first:  # a CPU's peak is measured once, and that must be before the start uses all cores
            peak_of(jax.local_devices()[0].device_kind, recipe.model.compute_dtype)
        setup = assemble(recipe, fixed_class_names(folder.path), trains=True)
        listeners.profiles.check(setup.num_steps)
        class_names = setup.train_source.class_names
        is_new = checkpoint.latest_step(folder.path) is None
        initial = initial_weights(recipe, class_names) if is_new else None
        if processes.is_first:
            say_unused(setup.train_source, setup.eval_source)
            for text in (spare_outputs(recipe.num_classes, class_names), initial.said if initial else None):
                warn(text)
        check_same_start(processes, recipe, initial, timeout_s=start_timeout_s)
        lease = opened.enter_context(_owned(folder)) if processes.is_first else None
        publisher = opened.enter_context(publishing(folder, lease))
        if processes.is_first:
            opened.enter_context(ledger.recording(folder.path / layout.EVENTS, LeaseLost, **facts_of(setup)))
        identity = setup.identity(initial.record if initial else None)
        for line in claim(processes, folder, identity, start_timeout_s):
            warn(line)
        opened.enter_context(logged(folder, processes))
        ledger.enter("restore")
        restored = restore_newest(folder, setup.abstract_state(), is_owner=True)
        trackers = opened.enter_context(tracked(recipe, folder.path, is_first=processes.is_first))
        log_every_steps = recipe.log_every_steps
        saver = opened.enter_context(
            saving(folder, recipe.checkpoint, lease, log_every_steps=log_every_steps, publisher=publisher)
        )
        arrays = initial.arrays if initial else {}
        state, notes = restored or (setup.create_state(arrays), make_notes(evaluated=False, metrics={}))
        step, evaluated = int(state.step), notes["evaluated"]
        ledger.record("restored", step)
        ledger.enter("start")
        if listeners.is_shown:
            print(groups_table(recipe.optim, setup.structure.shapes), flush=True)
            print_start(ledger, joined_s)
            if step > 0:
                print(f"{stamp()}continuing from step {step} in {folder}", flush=True)
        if step == setup.num_steps and evaluated:
            ledger.ends("finished")
            return TrainResult(step, step, noted_metrics(notes), finished=True)
        saver.resume_at(step)
        report = opened.enter_context(
            reporting(setup, folder, listeners, trackers, activity, step, evaluated=evaluated)
        )
        return _run(setup, state, notes, saver, stop, report)


@contextlib.contextmanager
def _owned(folder: RunFolder) -> Iterator[Lease]:
    with owning(folder.owner_folder, _end_at_once) as lease:
        folder.own(lease.check)
        yield lease


def _run(
    setup: Setup, state: TrainState, restored: Notes, saver: Saver, stop: StopPoint, report: Report
) -> TrainResult:
    recipe, num_steps = setup.recipe, setup.num_steps
    start_step = step = int(state.step)
    evaluated, eval_metrics = restored["evaluated"], noted_metrics(restored)
    with contextlib.ExitStack() as opened:
        batches = _open_batches(setup, step)
        opened.callback(batches.close)
        opened.callback(lambda: report.enter("end", step))
        while True:
            # 1. Evaluate.
            eval_due = step > 0 and (step % recipe.eval_every_steps == 0 or step == num_steps)
            if eval_due and not evaluated:
                report.window.drain(step)
                found = _evaluate(setup, state, step, stop, report)
                if found is not None:
                    evaluated, eval_metrics = True, found
                    report.evaluated(step, found)
                    report.enter("save", step)
                    if saver.save_if_best(state, step, found, report.log):
                        report.saved(step, "best")
                report.progress.restart_clock(step)
            # 2. Save.
            stopping = stop.reached()
            if saver.is_due(step, is_last=step == num_steps or stopping):
                report.window.drain(step)
                report.enter("save", step)
                report.log_step.flush()
                # If the run is stopped during the evaluation, the notes say so, and it is repeated after the resume.
                notes = make_notes(evaluated=evaluated or not eval_due, metrics=eval_metrics)
                saver.save(state, step, notes, report.log)
                report.saved(step, "checkpoints")
            if step == num_steps or stopping:
                report.window.drain(step)
                is_finished = step == num_steps and evaluated
                report.ends(step, eval_metrics, stop.reason if stopping else None, finished=is_finished)
                return TrainResult(step, num_steps, eval_metrics, finished=is_finished)
            # 3. Next batch.
            report.enter("input", step + 1)
            rows = next(batches)
            if step == 0:
                show_first_batch(setup, report.log, rows)
            batch = to_global(rows, setup.mesh)
            # 4. Step.
            report.enter("step", step + 1, "compile" if step == start_step else "step")
            state, metrics = setup.train_step(state, batch, setup.objective_arrays, setup.measures(step + 1))
            report.enter("step", step + 1)
            step, evaluated = step + 1, False
            if step == start_step + 1 and current().count > 1:
                check_copies(current(), fingerprints(state), step)
            # 5. Push metrics.
            report.stepped(step, metrics)


def _open_batches(setup: Setup, step: int) -> Batches:
    return train_batches(
        setup.recipe.data,
        setup.train_source,
        seed=setup.recipe.seed,
        start_step=step,
        num_steps=setup.num_steps,
        process_index=jax.process_index(),
        num_processes=jax.process_count(),
    )


def _end_at_once(error: LeaseLost) -> None:
    # Called in a thread. Whatever this process is doing, it must not write to the folder any more.
    print(f"{stamp()}nfnet: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


def _evaluate(setup: Setup, state: TrainState, step: int, stop: StopPoint, report: Report) -> dict[str, float] | None:
    def is_stopped() -> bool:
        report.enter("evaluation", step)
        return stop.reached()

    report.activity.ledger.enter("evaluation")
    with setup.eval_batches() as batches:
        weights = weights_to_evaluate(state)
        num_batches = -(-len(setup.eval_source) // setup.recipe.data.eval_batch_size)
        shown = track(batches, f"evaluating step {step}", "batches", num_batches, first_line_s=None)
        counted_in = setup.eval_source if setup.recipe.data.on_corrupt == "skip" else None
        return run_evaluation(
            setup.eval_step,
            weights,
            shown,
            setup.mesh,
            is_stopped,
            counted_in=counted_in,
            summarize=setup.recipe.objective.summarize,
            observe=observer(setup, report.log, step),
        )
