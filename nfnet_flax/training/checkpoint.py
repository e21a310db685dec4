"""Checkpoints, written by Orbax: the newest ones, and the best one in another folder, so that both are kept."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nfnet_flax.parallel.processes import current
from nfnet_flax.training.copies import check_copies
from nfnet_flax.training.fingerprints import fingerprints
from nfnet_flax.training.gathering import gathered
from nfnet_flax.training.layout import CHECKPOINTS, NOTES, NOTES_FILE, STATE, Notes, read_sealed, seal, steps_in
from nfnet_flax.training.state import TrainState
from nfnet_flax.training.storage import storage_errors

Kind = Literal["checkpoints", "best"]


@contextlib.contextmanager
def open_manager(workdir: Path, kind: Kind, *, keep: int, is_alone: bool = False) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run; leaving the context waits for checkpoints that are still being written.

    Args:
      workdir: folder of the run.
      kind: which of its folders.
      keep: number of checkpoints that are kept.
      is_alone: whether each process writes to a folder of its own; otherwise all write to the same.

    Raises:
      StorageFailed: the last checkpoint could not be written.
    """
    # Both managers may write the same step at once, so their barriers need different names.
    processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=kind)
    if is_alone:
        index = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"{kind}_{index}"
        )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        multiprocessing_options=processes,
        # Otherwise it would wait for the other processes.
        create=not is_alone,
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=not is_alone),
    )
    path = (workdir / kind).absolute()
    with storage_errors(path):
        if is_alone:
            path.mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(path, options=options, item_handlers=_handlers(processes))
    try:
        yield manager
    finally:
        with storage_errors(path):
            manager.close()


def _handlers(processes: ocp.options.MultiprocessingOptions) -> dict[str, Any]:
    # A manager of an empty folder cannot find out the handlers from the checkpoints in it.
    return {
        STATE: ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        NOTES: ocp.JsonCheckpointHandler(NOTES_FILE, multiprocessing_options=processes),
    }


def save(manager: ocp.CheckpointManager, state: TrainState, step: int, notes: Notes, *, is_alone: bool = False) -> None:
    """Starts writing a checkpoint of `step`, with a checksum of every array.

    Its folder appears under its final name only when it is complete. A checkpoint of the same step, left by an earlier
    process, is replaced.

    Args:
      manager: result of `open_manager`.
      state: the state; the same in all processes.
      step: its step.
      notes: facts about it.
      is_alone: whether each process writes to a folder of its own: process 0 the whole state, the others the notes.

    Raises:
      CopiesDiffer: devices or processes hold different states; nothing is written.
      StorageFailed: this or an earlier background write failed.
    """
    arrays = fingerprints(state)
    check_copies(current(), arrays, step)
    sealed = seal(notes, arrays)
    items: dict[str, Any] = {NOTES: ocp.args.JsonSave(sealed)}
    if not is_alone:
        items[STATE] = ocp.args.StandardSave(state)
    elif (whole := gathered(state)) is not None:
        items[STATE] = ocp.args.StandardSave(whole)
    with storage_errors(manager.directory):
        # If Orbax cannot make its folder, its threads wait for the folder for minutes, and the process for the threads.
        probe = Path(manager.directory) / f".writable.{jax.process_index()}"
        probe.write_bytes(b"0")
        probe.unlink()
        if step in manager.all_steps():
            manager.wait_until_finished()
            manager.delete(step)
        manager.save(step, args=ocp.args.Composite(**items), force=True)


def check_written(manager: ocp.CheckpointManager) -> None:
    """Checks, without waiting, whether a background write that has ended was successful.

    Raises:
      StorageFailed: it failed; the message says why.
    """
    if not manager.is_saving_in_progress():
        with storage_errors(manager.directory):
            manager.wait_until_finished()  # does not wait here, but only this call raises the error of the write


def wait_written(manager: ocp.CheckpointManager) -> None:
    """Waits until nothing is being written.

    Raises:
      StorageFailed: the last checkpoint could not be written.
    """
    with storage_errors(manager.directory):
        manager.wait_until_finished()


def latest_step(workdir: Path) -> int | None:
    """Newest step for which a run's folder has a checkpoint, damaged or not; only names are read."""
    return next(iter(steps_in(workdir / CHECKPOINTS)), None)


def read_newest_notes(manager: ocp.CheckpointManager) -> tuple[int, Notes] | None:
    """Step and notes of the newest checkpoint of a manager; None if there is none.

    Raises:
      StorageFailed: it is damaged, or a background write failed.
    """
    with storage_errors(manager.directory):
        manager.wait_until_finished()
        step = manager.latest_step()
        return None if step is None else (step, read_sealed(Path(manager.directory) / str(step))[0])


class SaveClock:
    """Says when the next checkpoint is due because of `every_minutes`, equally in all processes."""

    def __init__(self, every_minutes: float | None) -> None:
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self._started = time.monotonic()

    def restart(self) -> None:
        """To be called when a checkpoint was written."""
        self._started = time.monotonic()

    def is_due(self) -> bool:
        """Whether a checkpoint is due. To be called by every process at the same step, and not often, as the processes
        communicate: the clock of process 0 decides for all."""
        if self._every_s is None:
            return False
        due = time.monotonic() - self._started >= self._every_s
        return due if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(due)))
