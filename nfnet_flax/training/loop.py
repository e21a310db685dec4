"""The one training loop: it only orchestrates, and is meant to be read from top to bottom."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import jax

from nfnet_flax import IMPORTED_AT_S
from nfnet_flax.data.pipeline import say_unused, train_batches
from nfnet_flax.output import guarded_output
from nfnet_flax.parallel.mesh import to_global
from nfnet_flax.parallel.processes import check_platform, current
from nfnet_flax.recipe import Recipe
from nfnet_flax.runtime import check_deterministic, prepare, return_freed_memory
from nfnet_flax.training import checkpoint
from nfnet_flax.training.evaluation import run_evaluation, weights_to_evaluate
from nfnet_flax.training.metrics import MetricsLog, NoMetrics
from nfnet_flax.training.preemption import StopPoint, stop_requests
from nfnet_flax.training.progress import Progress
from nfnet_flax.training.restoring import Notes, restore_newest
from nfnet_flax.training.run import Setup, assemble, claim
from nfnet_flax.training.state import TrainState
from nfnet_flax.training.step import Metrics
from nfnet_flax.training.storage import reads_and_writes
from nfnet_flax.training.watchdog import Watchdog, WatchdogConfig
from nfnet_flax.weights.entries import Arrays

_MAX_STEPS_IN_FLIGHT = 2
_CLAIM_TIMEOUT_S = 300.0
"""How long process 0 may take to make the folder of the run, its input's fingerprint included."""


class TrainingDiverged(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """The loss or the gradient of a step is not finite. Nothing of that step or later was saved."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    """Updates done in all."""
    num_steps: int
    """Updates of the whole run."""
    metrics: dict[str, float]
    """Of the newest evaluation; empty if there was none."""

    finished: bool
    """False if the run was told to stop, be it during the last evaluation; the same call goes on from there."""


@guarded_output(goes_on=True)
def train(recipe: Recipe, workdir: str | Path, watchdog: Watchdog | None = None) -> TrainResult:
    """Trains until the recipe's last step or a signal to stop; continues from the newest checkpoint in `workdir`.

    The order within the loop is a contract: evaluate if due, save if due, next batch, step, push metrics. So a
    checkpoint at step N means that everything due at N is done, and a state that is not finite is never saved.

    Args:
      recipe: the run.
      workdir: its folder, which all processes see.
      watchdog: is told what the loop is busy with; None: nobody watches.

    Raises:
      ConfigError: the recipe does not fit the devices or the folder, the input is another than before, or an image
        cannot be decoded.
      InputFailed: the input failed otherwise: a worker died or is stuck, or a file cannot be read.
      StorageFailed: a checkpoint or the metrics cannot be written.
      TrainingDiverged: the loss or a gradient is not finite.
    """
    prepare(reproducible=recipe.execution.reproducible)
    workdir = Path(workdir)
    watchdog = watchdog or Watchdog(WatchdogConfig())
    times_s = [IMPORTED_AT_S, time.perf_counter()]
    with stop_requests(current()) as stop:
        check_platform(recipe.platform)  # of training only: a run may be evaluated anywhere
        if recipe.execution.reproducible:
            check_deterministic()
        setup = assemble(recipe)
        if current().is_first:
            say_unused(setup.train_source, setup.eval_source)
        weights = setup.initial_weights() if checkpoint.latest_step(workdir) is None else {}
        claim(current(), workdir, recipe, setup.input_identity(), _CLAIM_TIMEOUT_S)
        times_s.append(time.perf_counter())
        restored = restore_newest(workdir, setup.abstract_state(), is_owner=True)
        with (  # InputFailed is what reading the input raises
            reads_and_writes(workdir, OSError),
            checkpoint.open_manager(workdir, "checkpoints", keep=recipe.checkpoint.keep_last) as newest,
            checkpoint.open_manager(workdir, "best", keep=1) as best,
        ):
            start = restored or _start(setup, weights)
            _report_start([*times_s, time.perf_counter()])
            return _run(setup, workdir, start, newest, best, stop, watchdog)


def _run(
    setup: Setup,
    workdir: Path,
    start: tuple[TrainState, Notes],
    newest: Any,
    best: Any,
    stop: StopPoint,
    watchdog: Watchdog,
) -> TrainResult:
    recipe, num_steps = setup.recipe, setup.num_steps
    state, restored = start
    step = int(state.step)
    evaluated, eval_metrics = restored["evaluated"], restored["metrics"]
    if step > 0 and current().is_first:
        print(f"continuing from step {step} in {workdir}", flush=True)
    if step == num_steps and evaluated:
        return TrainResult(step, num_steps, eval_metrics, finished=True)

    is_first = current().is_first  # the one that writes and prints
    log = (
        MetricsLog(workdir, resume_step=step, evaluated=evaluated, tensorboard=recipe.tensorboard)
        if is_first
        else NoMetrics()
    )
    progress = Progress(num_steps=num_steps, batch_size=recipe.data.batch_size, start_step=step, is_shown=is_first)
    window = _Window(setup, log, progress, step)
    saved_step = step if step > 0 else None
    save_clock = checkpoint.SaveClock(recipe.checkpoint.every_minutes)
    batches = train_batches(
        recipe.data,
        setup.train_source,
        seed=recipe.seed,
        start_step=step,
        num_steps=num_steps,
        process_index=jax.process_index(),
        num_processes=jax.process_count(),
    )
    try:
        while True:
            # 1. Evaluate.
            eval_due = step > 0 and (step % recipe.eval_every_steps == 0 or step == num_steps)
            if eval_due and not evaluated:
                window.drain(step)
                found = _evaluate(setup, state, step, stop, watchdog)
                if found is not None:
                    evaluated, eval_metrics = True, found
                    log.write(step, found)
                    _report_evaluation(progress, step, found)
                    _save_if_best(best, recipe, state, step, found, log)
                progress.restart_clock(step)
            # 2. Save.
            stopping = stop.reached()
            save_due = False
            if step > 0 and step % recipe.log_every_steps == 0:
                checkpoint.check_written(newest)
                checkpoint.check_written(best)
                save_due = save_clock.is_due()
            save_due |= step > 0 and (step % recipe.checkpoint.every_steps == 0 or step == num_steps or stopping)
            if save_due and step != saved_step:
                watchdog.enter("save", step)
                window.drain(step)
                log.flush()
                # Told to stop during the evaluation, the checkpoint says so, and it is done after the resume.
                notes = {"evaluated": evaluated or not eval_due, "metrics": eval_metrics}
                checkpoint.save(newest, state, step, notes)
                save_clock.restart()
                saved_step = step
            if step == num_steps or stopping:
                window.drain(step)
                if stopping:
                    progress.say(f"stopping at step {step}: {stop.reason}")
                return TrainResult(step, num_steps, eval_metrics, finished=step == num_steps and evaluated)
            # 3. Next batch.
            watchdog.enter("input", step + 1)
            started = time.perf_counter()
            rows = next(batches)
            data_wait_s = time.perf_counter() - started
            batch = to_global(rows, setup.mesh)
            # 4. Step.
            watchdog.enter("step", step + 1)
            state, metrics = setup.train_step(state, batch)
            step, evaluated = step + 1, False
            # 5. Push metrics.
            window.push(step, metrics, data_wait_s)
    finally:
        watchdog.enter("end", step)
        log.close()
        batches.close()


def _start(setup: Setup, weights: Arrays) -> tuple[TrainState, Notes]:
    return setup.create_state(weights), {"evaluated": False, "metrics": {}}


def _report_start(times_s: list[float]) -> None:
    # The first step, with what it waited for and compiled, is reported when it is done.
    if current().is_first:
        imports, data, state = (after - before for before, after in itertools.pairwise(times_s))
        print(
            f"ready {times_s[-1] - times_s[0]:.1f} s after the start: imports and joining {imports:.1f} s, "
            f"data and folder {data:.1f} s, state {state:.1f} s",
            flush=True,
        )


def _evaluate(
    setup: Setup, state: TrainState, step: int, stop: StopPoint, watchdog: Watchdog
) -> dict[str, float] | None:
    def is_stopped() -> bool:
        watchdog.enter("evaluation", step)
        return stop.reached()

    with setup.eval_batches() as batches:
        return run_evaluation(setup.eval_step, weights_to_evaluate(state), batches, setup.mesh, is_stopped)


def _report_evaluation(progress: Progress, step: int, metrics: dict[str, float]) -> None:
    progress.say(
        f"step {step}: top-1 {metrics['eval/top1']:.2%} raw, {metrics['eval_ema/top1']:.2%} EMA "
        f"on {metrics['eval/num_examples']:.0f} held-out examples"
    )


def _save_if_best(
    best: Any, recipe: Recipe, state: TrainState, step: int, metrics: dict[str, float], log: MetricsLog | NoMetrics
) -> None:
    # The best so far is read from its checkpoint: a restarted process knows no less than one that was never killed.
    previous = checkpoint.read_notes(best)
    name = recipe.checkpoint.best_metric
    if previous is None or metrics[name] > previous["metrics"][name]:
        log.flush()
        checkpoint.save(best, state, step, {"evaluated": True, "metrics": metrics})


class _Window:
    """Metrics of the steps since the last log step. They stay on the device until they are drained together."""

    def __init__(self, setup: Setup, log: MetricsLog | NoMetrics, progress: Progress, step: int) -> None:
        self._setup = setup
        self._log = log
        self._progress = progress
        self._first_step = step + 1
        self._started = time.perf_counter()
        self._pending: list[tuple[int, Metrics]] = []
        self._data_wait_s = 0.0

    def push(self, step: int, metrics: Metrics, data_wait_s: float) -> None:
        """Takes the metrics of a step, and drains if they are due to be written."""
        self._pending.append((step, metrics))
        self._data_wait_s += data_wait_s
        if step == self._first_step:
            jax.block_until_ready(metrics)
            return_freed_memory()
            self._progress.say(
                f"first step after {time.perf_counter() - self._started:.1f} s more: input {data_wait_s:.1f} s, "
                "the rest compilation or its cache, and the step"
            )
        elif len(self._pending) > _MAX_STEPS_IN_FLIGHT:  # bounds the batches held, and how late a stop is noticed
            jax.block_until_ready(self._pending[-1 - _MAX_STEPS_IN_FLIGHT][1])
        if step % self._setup.recipe.log_every_steps == 0:
            self.drain(step)
        elif step == self._first_step:
            self._progress.restart_clock(step)

    def drain(self, step: int) -> None:
        """Fetches what is pending, stops the run if any of it is not finite, and writes the log steps."""
        if not self._pending:
            return
        recipe = self._setup.recipe
        for done, values in jax.device_get(self._pending):
            metrics = {name: float(value) for name, value in values.items()}
            if not math.isfinite(metrics["train/loss"]) or not math.isfinite(metrics["train/grad_norm"]):
                raise TrainingDiverged(
                    f"step {done}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}, "
                    f"learning rate {metrics['train/learning_rate']:.3g}, optim.clipping {recipe.optim.clipping}. "
                    "Nothing of this step was saved; lower optim.learning_rate_per_256 or optim.clipping "
                    "and start in a new workdir"
                )
            if done % recipe.log_every_steps == 0:
                rate = self._progress.images_per_s(step)
                metrics["throughput/images_per_s"] = rate
                metrics["time/data_wait_s"] = self._data_wait_s
                self._log.write(done, metrics)
                self._progress.show(done, metrics["train/loss"], rate)
            elif metrics.get("data/num_corrupt", 0.0) > 0:  # every one is on record, though no log step is due
                self._log.write(done, {"data/num_corrupt": metrics["data/num_corrupt"]})
        self._pending.clear()
        if step % recipe.log_every_steps == 0:
            self._data_wait_s = 0.0
            return_freed_memory()
            self._progress.restart_clock(step)
