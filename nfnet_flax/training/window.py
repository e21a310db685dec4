"""Metrics of the steps between two log steps, which are kept on the device and fetched together."""

import math
import time

import jax
import numpy as np

from nfnet_flax.messages import warn
from nfnet_flax.parallel.processes import current
from nfnet_flax.runtime import return_freed_memory
from nfnet_flax.training.layout import METRICS
from nfnet_flax.training.log_step import LogStep
from nfnet_flax.training.metrics import MetricsLog, NoMetrics
from nfnet_flax.training.progress import Progress
from nfnet_flax.training.setup import Setup
from nfnet_flax.training.step import MEASURED, UNIT_RATIOS, Metrics

_MAX_STEPS_IN_FLIGHT = 2
_NUM_CORRUPT = "data/num_corrupt"


class TrainingDiverged(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """The loss or the gradient of a step is not finite. Nothing of that step or later was saved."""


class Window:
    """Metrics of the steps since the last log step. They stay on the device until `drain` fetches all of them."""

    def __init__(
        self, setup: Setup, log: MetricsLog | NoMetrics, progress: Progress, log_step: LogStep, step: int
    ) -> None:
        self._setup = setup
        self._log = log
        self._progress = progress
        self._log_step = log_step
        self._first_step = step + 1
        self._started = time.perf_counter()
        self._pending: list[tuple[int, Metrics]] = []
        self._ratios: jax.Array | None = None
        self._says_corrupt = current().is_first

    def push(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of a step, and calls `drain` if metrics are due to be written."""
        is_due = step % self._setup.recipe.log_every_steps == 0
        self._ratios = metrics.get(UNIT_RATIOS) if is_due else None
        left_out = {UNIT_RATIOS} if is_due else MEASURED
        self._pending.append((step, {name: value for name, value in metrics.items() if name not in left_out}))
        if step == self._first_step:
            jax.block_until_ready(metrics)
            self._log.open_events()
            return_freed_memory()
            since_s, waited_s = time.perf_counter() - self._started, self._log_step.data_wait_s()
            self._progress.say(
                f"first step after {since_s:.1f} s more: input {waited_s:.1f} s, the rest compilation or its cache, "
                "and the step"
            )
        elif len(self._pending) > _MAX_STEPS_IN_FLIGHT:  # limits the batches in memory, and the delay of a stop
            jax.block_until_ready(self._pending[-1 - _MAX_STEPS_IN_FLIGHT][1])
        if is_due:
            self.drain(step)
        elif step == self._first_step:
            self._progress.restart_clock(step)

    def drain(self, step: int) -> None:
        """Fetches the pending metrics, ends the run if any of them is not finite, and writes those of log steps."""
        if not self._pending:
            return
        recipe = self._setup.recipe
        first_step, num_corrupt = self._pending[0][0], 0.0
        for done, values in jax.device_get(self._pending):
            metrics = {name: float(value) for name, value in values.items()}
            if not math.isfinite(metrics["train/loss"]) or not math.isfinite(metrics["train/grad_norm"]):
                raise TrainingDiverged(
                    f"step {done}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}, "
                    f"learning rate {metrics['train/learning_rate']:.3g}, optim.clipping {recipe.optim.clipping}. "
                    "Nothing of this step was saved; lower the learning rate or clip more, "
                    "and start in a new workdir"
                )
            num_corrupt += metrics.get(_NUM_CORRUPT, 0.0)
            if done % recipe.log_every_steps == 0:
                rate = self._progress.images_per_s(step)
                ratios = None if self._ratios is None else np.asarray(self._ratios)
                self._log.write(done, _shown(metrics) | self._log_step.metrics(done, rate, ratios))
                self._progress.show(done, metrics["train/loss"], rate)
            elif metrics.get(_NUM_CORRUPT, 0.0) > 0:  # every corrupt image is recorded, also between log steps
                self._log.write(done, {_NUM_CORRUPT: metrics[_NUM_CORRUPT]})
        if num_corrupt > 0 and self._says_corrupt:
            self._says_corrupt = False
            warn(_corrupt_text(round(num_corrupt), first_step, self._pending[-1][0]))
        self._pending.clear()
        if step % recipe.log_every_steps == 0:
            return_freed_memory()
            self._progress.restart_clock(step)


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without the number of corrupt images, unless there are any."""
    return {name: value for name, value in metrics.items() if name != _NUM_CORRUPT or value > 0}


def _corrupt_text(number: int, first_step: int, last_step: int) -> str:
    """What is said once in each start, when damaged images are replaced for the first time."""
    steps = f"step {first_step}" if first_step == last_step else f"steps {first_step} to {last_step}"
    images = "1 damaged image was" if number == 1 else f"{number} damaged images were"
    return (
        f"{images} replaced by other images in {steps} (--data.on-corrupt skip). From now on they are only counted: "
        f"as {_NUM_CORRUPT} in {METRICS}, and nfnet report adds them up; nfnet doctor --workdir DIR --all-images names "
        "them"
    )
