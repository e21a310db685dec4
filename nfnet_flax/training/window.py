"""Metrics of the steps between two log steps, which are kept on the device and fetched together."""

import math
import time

import jax

from nfnet_flax.runtime import return_freed_memory
from nfnet_flax.training.metrics import MetricsLog, NoMetrics
from nfnet_flax.training.progress import Progress
from nfnet_flax.training.setup import Setup
from nfnet_flax.training.step import Metrics

_MAX_STEPS_IN_FLIGHT = 2


class TrainingDiverged(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """The loss or the gradient of a step is not finite. Nothing of that step or later was saved."""


class Window:
    """Metrics of the steps since the last log step. They stay on the device until `drain` fetches all of them."""

    def __init__(self, setup: Setup, log: MetricsLog | NoMetrics, progress: Progress, step: int) -> None:
        self._setup = setup
        self._log = log
        self._progress = progress
        self._first_step = step + 1
        self._started = time.perf_counter()
        self._pending: list[tuple[int, Metrics]] = []
        self._data_wait_s = 0.0

    def push(self, step: int, metrics: Metrics, data_wait_s: float) -> None:
        """Adds the metrics of a step, and calls `drain` if metrics are due to be written."""
        self._pending.append((step, metrics))
        self._data_wait_s += data_wait_s
        if step == self._first_step:
            jax.block_until_ready(metrics)
            return_freed_memory()
            self._progress.say(
                f"first step after {time.perf_counter() - self._started:.1f} s more: input {data_wait_s:.1f} s, "
                "the rest compilation or its cache, and the step"
            )
        elif len(self._pending) > _MAX_STEPS_IN_FLIGHT:  # limits the batches in memory, and the delay of a stop
            jax.block_until_ready(self._pending[-1 - _MAX_STEPS_IN_FLIGHT][1])
        if step % self._setup.recipe.log_every_steps == 0:
            self.drain(step)
        elif step == self._first_step:
            self._progress.restart_clock(step)

    def drain(self, step: int) -> None:
        """Fetches the pending metrics, ends the run if any of them is not finite, and writes those of log steps."""
        if not self._pending:
            return
        recipe = self._setup.recipe
        for done, values in jax.device_get(self._pending):
            metrics = {name: float(value) for name, value in values.items()}
            if not math.isfinite(metrics["train/loss"]) or not math.isfinite(metrics["train/grad_norm"]):
                raise TrainingDiverged(
                    f"step {done}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}, "
                    f"learning rate {metrics['train/learning_rate']:.3g}, optim.clipping {recipe.optim.clipping}. "
                    "Nothing of this step was saved; lower the learning rate or clip more, "
                    "and start in a new workdir"
                )
            if done % recipe.log_every_steps == 0:
                rate = self._progress.images_per_s(step)
                metrics["throughput/images_per_s"] = rate
                metrics["time/data_wait_s"] = self._data_wait_s
                self._log.write(done, metrics)
                self._progress.show(done, metrics["train/loss"], rate)
            elif metrics.get("data/num_corrupt", 0.0) > 0:  # every corrupt image is recorded, also between log steps
                self._log.write(done, {"data/num_corrupt": metrics["data/num_corrupt"]})
        self._pending.clear()
        if step % recipe.log_every_steps == 0:
            self._data_wait_s = 0.0
            return_freed_memory()
            self._progress.restart_clock(step)
