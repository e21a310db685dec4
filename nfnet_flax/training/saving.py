"""When a run saves, and what it keeps: the newest checkpoints, and the best one in addition."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp

from nfnet_flax.recipe import CheckpointConfig
from nfnet_flax.training import checkpoint
from nfnet_flax.training.layout import Notes
from nfnet_flax.training.lease import Lease
from nfnet_flax.training.metrics import MetricsLog, NoMetrics
from nfnet_flax.training.state import TrainState


def make_notes(*, evaluated: bool, metrics: dict[str, float]) -> Notes:
    """What a checkpoint notes of its run; JSON, which has no word for a number that is not finite but `null`.

    Args:
      evaluated: whether the evaluation that is due at the checkpoint's step is done.
      metrics: of the newest evaluation.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"evaluated": evaluated, "metrics": finite}


def noted_metrics(notes: Notes) -> dict[str, float]:
    """The metrics of the newest evaluation, from what `make_notes` made."""
    return {name: math.nan if value is None else value for name, value in notes["metrics"].items()}


class Saver:
    """Writes the checkpoints of one run; made by `saving`."""

    def __init__(
        self,
        config: CheckpointConfig,
        newest: ocp.CheckpointManager,
        best: ocp.CheckpointManager,
        lease: Lease | None,
        log_every_steps: int,
    ) -> None:
        self._config = config
        self._newest = newest
        self._best = best
        self._lease = lease
        self._log_every_steps = log_every_steps
        self._clock = checkpoint.SaveClock(config.every_minutes)
        self._saved_step = 0
        self._lost_best: int | None = None

    def resume_at(self, step: int) -> None:
        """Takes note of the checkpoint that the run goes on from; 0: it begins.

        Raises:
          StorageFailed: the best checkpoint cannot be read.
        """
        self._saved_step = step
        found = checkpoint.read_newest_notes(self._best)
        # The run was beyond this step before. What it does from here on replaces all that was saved later.
        self._lost_best = found[0] if found is not None and found[0] > step else None

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether a checkpoint is to be written at a step; to be asked by all processes alike.

        Raises:
          StorageFailed: an earlier one could not be written.
        """
        is_due = is_last or (step > 0 and step % self._config.every_steps == 0)
        if step > 0 and step % self._log_every_steps == 0:
            checkpoint.check_written(self._newest)
            checkpoint.check_written(self._best)
            is_due |= self._clock.is_due()
        return step > 0 and is_due and step != self._saved_step

    def save(self, state: TrainState, step: int, notes: Notes, log: MetricsLog | NoMetrics) -> None:
        """Starts writing a checkpoint of a step, after its metrics are on disk.

        Raises:
          CopiesDiffer: as `checkpoint.save`.
          LeaseLost: the folder belongs to another process by now.
          StorageFailed: as `checkpoint.save`.
        """
        self._check_lease()
        log.flush()
        checkpoint.save(self._newest, state, step, notes)
        self._clock.restart()
        self._saved_step = step

    def save_if_best(
        self, state: TrainState, step: int, metrics: dict[str, float], log: MetricsLog | NoMetrics
    ) -> None:
        """Starts writing the state as the best one, if its metric is better than that of the best one so far.

        Raises:
          CopiesDiffer: as `checkpoint.save`.
          LeaseLost: the folder belongs to another process by now.
          StorageFailed: as `checkpoint.save`.
        """
        name = self._config.best_metric
        if not math.isfinite(metrics[name]):
            return
        # Read from its checkpoint: a restarted process knows no less than one that was never killed.
        previous = checkpoint.read_newest_notes(self._best)
        if previous is not None:
            previous_step, previous_metrics = previous[0], noted_metrics(previous[1])
            is_replaced = self._lost_best == previous_step and step >= previous_step and metrics != previous_metrics
            # Where the metric was not recorded then, or is not a number, nothing can be compared: the new one is taken.
            than = previous_metrics.get(name, math.nan)
            sign = 1 if self._config.best_is == "highest" else -1
            if not is_replaced and math.isfinite(than) and sign * metrics[name] <= sign * than:
                return
        self._check_lease()
        log.flush()
        checkpoint.save(self._best, state, step, make_notes(evaluated=True, metrics=metrics))
        self._lost_best = None

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()


@contextlib.contextmanager
def saving(workdir: Path, config: CheckpointConfig, lease: Lease | None, *, log_every_steps: int) -> Iterator[Saver]:
    """Opens the checkpoints of a run; leaving the context waits for what is still being written.

    Args:
      workdir: folder of the run.
      config: when to save and how many to keep.
      lease: of the folder; None in processes other than the first.
      log_every_steps: how often background writes are looked at.

    Raises:
      StorageFailed: the folders cannot be made, or the last checkpoint could not be written.
    """
    with (
        checkpoint.open_manager(workdir, "checkpoints", keep=config.keep_last) as newest,
        checkpoint.open_manager(workdir, "best", keep=1) as best,
    ):
        yield Saver(config, newest, best, lease, log_every_steps)
