"""Checkpoints on Orbax: the newest few, and the best apart from them so that neither evicts the other."""

import json
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from nfnet_flax.config import ConfigError
from nfnet_flax.training.state import TrainState

Kind = Literal["checkpoints", "best"]
Notes = dict[str, Any]
"""What is known of a checkpoint besides its state: JSON."""


def open_manager(workdir: Path, kind: Kind, *, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a run; close it to wait for what is still being written."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        # Both managers may write the same step at once: without names of their own their barriers would collide.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=kind),
    )
    return ocp.CheckpointManager((workdir / kind).absolute(), options=options, item_handlers=_handlers())


def _handlers() -> dict[str, Any]:
    # A manager that has not saved anything yet cannot know them from the folder.
    return {"state": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}


def save(manager: ocp.CheckpointManager, state: TrainState, step: int, notes: Notes) -> None:
    """Starts writing a checkpoint of `step`; a directory appears under its final name only when it is complete.

    Raises:
      Exception: an earlier background write failed (disk full, folder not writable).
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
    manager.save(step, args=items, force=True)


def latest_step(workdir: Path) -> int | None:
    """Newest complete checkpoint of a run; reads only."""
    folder = workdir / "checkpoints"
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def restore(manager: ocp.CheckpointManager, step: int, abstract_state: TrainState) -> tuple[TrainState, Notes]:
    """The state at `step`, onto the shardings of `abstract_state`, bit for bit.

    Raises:
      ConfigError: the checkpoint holds other parameters, shapes or types than this recipe makes.
    """
    stored = manager.item_metadata(step).state
    _check_matches(stored, abstract_state, step)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), notes=ocp.args.JsonRestore())
    restored = manager.restore(step, args=items)
    return restored.state, dict(restored.notes)


def read(workdir: Path, step: int, abstract_state: TrainState) -> tuple[TrainState, Notes]:
    """As `restore`, without a manager and without changing anything in the run's folder."""
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    folder = (workdir / "checkpoints").absolute()
    with ocp.CheckpointManager(folder, options=options, item_handlers=_handlers()) as manager:
        return restore(manager, step, abstract_state)


def read_notes(manager: ocp.CheckpointManager) -> Notes | None:
    """Notes of the newest checkpoint of a manager; None if there is none."""
    manager.wait_until_finished()
    step = manager.latest_step()
    if step is None:
        return None
    return dict(manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes)


def _check_matches(stored: Any, abstract_state: TrainState, step: int) -> None:
    """Orbax casts types silently; refuse instead."""

    def summary(tree: Any) -> dict[str, tuple[Any, ...]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            json.dumps([str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]): (
                tuple(leaf.shape),
                str(leaf.dtype),
            )
            for path, leaf in leaves
        }

    have, want = summary(getattr(stored, "tree", stored)), summary(abstract_state)
    if have != want:
        names = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        lines = [f"{name}: stored {have.get(name)}, expected {want.get(name)}" for name in names[:5]]
        raise ConfigError(f"checkpoint {step} does not fit this recipe ({len(names)} entries): " + "; ".join(lines))
