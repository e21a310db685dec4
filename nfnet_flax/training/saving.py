"""When a run saves, and which checkpoints it keeps: the newest ones, and the best one in addition."""

import contextlib
import math
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from nfnet_flax.recipe import CheckpointConfig
from nfnet_flax.training import checkpoint
from nfnet_flax.training.layout import Notes
from nfnet_flax.training.lease import Lease
from nfnet_flax.training.metrics import MetricsLog, NoMetrics
from nfnet_flax.training.publishing import Publisher
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.state import TrainState


def make_notes(*, evaluated: bool, metrics: dict[str, float]) -> Notes:
    """The notes of a checkpoint about its run, as JSON; a number that is not finite becomes None.

    Args:
      evaluated: whether the evaluation that is due at the checkpoint's step is done.
      metrics: metrics of the newest evaluation.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"evaluated": evaluated, "metrics": finite}


def noted_metrics(notes: Notes) -> dict[str, float]:
    """The metrics of the newest evaluation, from notes that `make_notes` made."""
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
        *,
        publisher: Publisher | None = None,
        is_alone: bool = False,
    ) -> None:
        self._config = config
        self._publisher = publisher
        self._is_alone = is_alone
        self._newest = newest
        self._best = best
        self._lease = lease
        self._log_every_steps = log_every_steps
        self._clock = checkpoint.SaveClock(config.every_minutes)
        self._saved_step = 0
        self._lost_best: int | None = None

    def resume_at(self, step: int) -> None:
        """Sets the step of the checkpoint from which the run continues; 0: it begins.

        Raises:
          StorageFailed: the best checkpoint cannot be read.
        """
        self._saved_step = step
        found = checkpoint.read_newest_notes(self._best)
        # If the run was beyond this step before, its new results replace everything that was saved later.
        self._lost_best = found[0] if found is not None and found[0] > step else None

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether a checkpoint has to be written at a step; to be called equally by all processes.

        Raises:
          StorageFailed: an earlier one could not be written.
        """
        is_due = is_last or (step > 0 and step % self._config.every_steps == 0)
        if step > 0 and step % self._log_every_steps == 0:
            checkpoint.check_written(self._newest)
            checkpoint.check_written(self._best)
            if self._publisher is not None:
                self._publisher.check()
            is_due |= self._clock.is_due()
        return step > 0 and is_due and step != self._saved_step

    def save(self, state: TrainState, step: int, notes: Notes, log: MetricsLog | NoMetrics) -> None:
        """Starts writing a checkpoint of a step, after its metrics are on disk.

        Raises:
          CopiesDiffer: as for `checkpoint.save`.
          LeaseLost: the folder belongs to another process now.
          StorageFailed: as for `checkpoint.save`.
        """
        self._write("checkpoints", self._newest, state, step, notes, log)
        self._clock.restart()
        self._saved_step = step

    def save_if_best(
        self, state: TrainState, step: int, metrics: dict[str, float], log: MetricsLog | NoMetrics
    ) -> bool:
        """Starts writing the state as the best checkpoint, if its metric is better than that of the best one so far.

        Returns:
          Whether it is written.

        Raises:
          CopiesDiffer: as for `checkpoint.save`.
          LeaseLost: the folder belongs to another process now.
          StorageFailed: as for `checkpoint.save`.
        """
        name = self._config.best_metric
        if not math.isfinite(metrics[name]):
            return False
        # Read from the checkpoint, so that a restarted process decides the same as one that was never killed.
        previous = checkpoint.read_newest_notes(self._best)
        if previous is not None:
            previous_step, previous_metrics = previous[0], noted_metrics(previous[1])
            is_replaced = self._lost_best == previous_step and step >= previous_step and metrics != previous_metrics
            # If the older metric was not recorded, or is not a number, the new checkpoint is taken without comparing.
            than = previous_metrics.get(name, math.nan)
            sign = 1 if self._config.best_is == "highest" else -1
            if not is_replaced and math.isfinite(than) and sign * metrics[name] <= sign * than:
                return False
        self._write("best", self._best, state, step, make_notes(evaluated=True, metrics=metrics), log)
        self._lost_best = None
        return True

    def _write(
        self,
        kind: checkpoint.Kind,
        manager: ocp.CheckpointManager,
        state: TrainState,
        step: int,
        notes: Notes,
        log: MetricsLog | NoMetrics,
    ) -> None:
        if self._lease is not None and self._publisher is None:  # which makes sure of it by itself
            self._lease.check()
        log.flush()
        if self._publisher is not None:
            # What failed to be written is never sent; and Orbax may delete what is still being sent.
            checkpoint.wait_written(self._newest)
            checkpoint.wait_written(self._best)
            self._publisher.wait()
        checkpoint.save(manager, state, step, notes, is_alone=self._is_alone)
        if self._publisher is not None:
            self._publisher.publish(kind, step)


@contextlib.contextmanager
def saving(
    folder: RunFolder,
    config: CheckpointConfig,
    lease: Lease | None,
    *,
    log_every_steps: int,
    publisher: Publisher | None = None,
) -> Iterator[Saver]:
    """Opens the checkpoints of a run; leaving the context waits for checkpoints that are still being written.

    Args:
      folder: folder of the run.
      config: when to save and how many checkpoints to keep.
      lease: ownership of the folder; None in processes other than the first.
      log_every_steps: interval, in steps, at which background writes are checked.
      publisher: result of `publishing`; None: the run is on a disk.

    Raises:
      StorageFailed: the folders cannot be made, or the last checkpoint could not be written.
    """
    is_alone = folder.mirror is not None and jax.process_count() > 1
    with (
        checkpoint.open_manager(folder.path, "checkpoints", keep=config.keep_last, is_alone=is_alone) as newest,
        checkpoint.open_manager(folder.path, "best", keep=1, is_alone=is_alone) as best,
    ):
        yield Saver(config, newest, best, lease, log_every_steps, publisher=publisher, is_alone=is_alone)


@contextlib.contextmanager
def publishing(folder: RunFolder, lease: Lease | None) -> Iterator[Publisher | None]:
    """What sends checkpoints to the bucket of the run; None if the run is on a disk, or this is not its owner. Leaving
    the context sends the last records."""
    if folder.mirror is None or lease is None:
        yield None
        return
    publisher = Publisher(folder.mirror)
    try:
        yield publisher
    except BaseException:
        publisher.close(is_ok=False)
        raise
    publisher.close(is_ok=True)
