"""Reads the newest checkpoint whose arrays are, bit for bit, what was saved, onto any mesh.

Orbax writes checkpoints, in formats of TensorStore (Zarr arrays in an OCDBT database). They are read with TensorStore
and not with Orbax: Orbax does not notice flipped bytes in its data, fails if they are in its other files, and makes
processes wait for one another while reading. Here every process reads its shards independently, and then all report
their result.
"""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nfnet_flax.config import ConfigError
from nfnet_flax.messages import warn
from nfnet_flax.progress import track
from nfnet_flax.training.fingerprints import Fingerprints, describe_type, fingerprints, named_leaves
from nfnet_flax.training.layout import (
    BEST,
    CHECKPOINTS,
    Damaged,
    Notes,
    array_context,
    check_type,
    free_place,
    open_array,
    read_array,
    read_sealed,
    reading,
    steps_in,
)
from nfnet_flax.training.mirror import fetch_state
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.state import TrainState

_NUM_READERS = 8
"""Number of arrays that are read at the same time."""
_TIMEOUT_S = 3600
"""Longest time that processes wait for one that is still reading, in seconds."""
_NO_STEP = -1
_barrier_names = (f"checkpoint read {number}" for number in itertools.count())


class AllDamaged(ConfigError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """A run has checkpoints, but none that is good."""

    def __init__(self, folder: Path) -> None:
        self.said = f"all checkpoints in {str(folder)!r} are damaged"
        """The message without the remedy, which depends on what the run is for."""
        super().__init__(f"{self.said}: restore a good one from a copy, or move that folder away to start at step 0")


def restore_newest(run: RunFolder, abstract_state: TrainState, *, is_owner: bool) -> tuple[TrainState, Notes] | None:
    """The newest state that is undamaged, bit for bit; for each newer one a warning gives the reason.

    Args:
      run: folder of the run.
      abstract_state: shapes, types and shardings of the state on the present mesh.
      is_owner: whether this run owns the folder and will save there: then damaged checkpoints are moved away, and
        incomplete ones are deleted. Otherwise nothing in the folder is changed.

    Returns:
      The state and its notes, of the same step in every process; None if there is no checkpoint yet.

    Raises:
      AllDamaged: there are checkpoints, but all of them are damaged.
      ConfigError: the newest good one contains other arrays than this recipe needs.
      StorageFailed: a checkpoint cannot be read for another reason than damage. Nothing was moved.
    """
    folder = run.path / CHECKPOINTS
    damaged: list[int] = []
    steps = iter(steps_in(folder) if jax.process_index() == 0 else ())
    while (step := _of_first_process(next(steps, _NO_STEP))) != _NO_STEP:
        found = _read_verified(folder / str(step), abstract_state)
        if found is not None:
            break
        damaged.append(step)
    else:
        if damaged:
            raise AllDamaged(folder)
        found = None
    if is_owner and jax.process_index() == 0:
        _clear(run, damaged)
    return found


def _read_verified(checkpoint: Path, abstract_state: TrainState) -> tuple[TrainState, Notes] | None:
    """State and notes; None in all processes if one of them found damage."""
    found, damage = None, ""
    try:
        found = read(checkpoint, abstract_state)
    except Damaged as error:  # any other error does not mean damage, and ends the start
        damage = str(error)
    if _is_undamaged(checkpoint, damage) and found is not None:
        state, notes, saved = found
        # Computed from the arrays on the devices, so that errors between disk and devices are noticed, too.
        computed = fingerprints(state)
        differing = [name for name in saved if computed[name] != saved[name]]
        damage = f"{differing[0]} is {computed[differing[0]]} instead of {saved[differing[0]]}" if differing else ""
        if _is_undamaged(checkpoint, damage):
            return state, notes
    return None


def _is_undamaged(checkpoint: Path, damage: str) -> bool:
    """Whether no process found damage; the first process that did prints a warning."""
    is_good = np.asarray([not damage])
    if jax.process_count() > 1:
        _wait_for_all()
        is_good = multihost_utils.process_allgather(is_good).reshape(-1)
    if not is_good.all() and jax.process_index() == int(np.argmin(is_good)):
        warn(f"checkpoint {checkpoint} is damaged and skipped: {damage}")
    return bool(is_good.all())


def read(checkpoint: Path, abstract_state: TrainState) -> tuple[TrainState, Notes, Fingerprints]:
    """Reads a checkpoint with the shardings of `abstract_state`; each process reads its own shards.

    Returns:
      The state, its notes, and the fingerprints that it had when it was saved; these are not compared with the state.

    Raises:
      ConfigError: the checkpoint contains other arrays than `abstract_state`.
      Damaged: the notes or an array differ from what was saved.
      StorageFailed: they cannot be read; they need not be damaged.
    """
    fetch_state(checkpoint)
    notes, saved = read_sealed(checkpoint)
    wanted = named_leaves(abstract_state)
    _check_matches(checkpoint, saved, wanted)
    context = array_context()

    def read_shards(name: str) -> jax.Array:
        leaf = wanted[name]
        with reading(checkpoint, name):
            stored = open_array(checkpoint, name, context)
        check_type(name, stored, saved[name])

        def part(index: Any) -> np.ndarray:
            with reading(checkpoint, name):
                return np.asarray(stored[index].read().result())

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    with ThreadPoolExecutor(_NUM_READERS) as readers:
        arrays = list(track(readers.map(read_shards, wanted), f"reading {checkpoint}", "arrays", len(wanted)))
    return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays), notes, saved


def read_arrays(checkpoint: Path, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Reads some fields of the state in a checkpoint into the host's memory, and compares them with their checksums.

    Args:
      checkpoint: folder of the checkpoint.
      wanted: field of `TrainState`, such as `ema_params` -> shape and type of each of its arrays.

    Raises:
      ConfigError: the checkpoint contains other arrays in these fields.
      Damaged: the notes or an array differ from what was saved.
      StorageFailed: they cannot be read.
    """
    fetch_state(checkpoint)
    _, saved = read_sealed(checkpoint)
    leaves = named_leaves(wanted)
    _check_matches(checkpoint, {name: text for name, text in saved.items() if name.split(".")[0] in wanted}, leaves)
    context = array_context()
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        found_arrays = readers.map(lambda name: read_array(checkpoint, name, saved[name], context), leaves)
        arrays = list(track(found_arrays, f"reading {checkpoint}", "arrays", len(leaves)))
    found: dict[str, dict[str, np.ndarray]] = jax.tree.unflatten(jax.tree.structure(wanted), arrays)
    return found


def _check_matches(checkpoint: Path, saved: Fingerprints, wanted: dict[str, Any]) -> None:
    have = {name: text.split()[0] for name, text in saved.items()}
    want = {name: describe_type(leaf) for name, leaf in wanted.items()}
    if have != want:
        names = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        lines = [f"{name}: stored {have.get(name)}, expected {want.get(name)}" for name in names[:5]]
        raise ConfigError(f"{checkpoint} does not fit this recipe ({len(names)} entries): " + "; ".join(lines))


def _clear(run: RunFolder, damaged: list[int]) -> None:
    """Deletes incomplete checkpoints and moves damaged ones away: they would hinder later saves, or would be
    counted."""
    for kind in (CHECKPOINTS, BEST):
        for path in sorted((run.path / kind).glob("*.orbax-checkpoint-tmp*")):
            warn(f"{path} was never completed: deleted")
            shutil.rmtree(path)
    for step in damaged:
        _set_aside(run, run.path / CHECKPOINTS / str(step))
    # Of the best checkpoint only the notes are read, because a run uses only these when it continues.
    for step in steps_in(run.path / BEST):
        path = run.path / BEST / str(step)
        try:
            read_sealed(path)
        except Damaged as damage:
            warn(f"checkpoint {path} is damaged, so the best is chosen anew: {damage}")
            _set_aside(run, path)


def _set_aside(run: RunFolder, path: Path) -> None:
    if run.mirror is not None:
        run.mirror.set_aside(path)
        return
    target = free_place(path.parent.parent, f"{path.parent.name}-{path.name}")
    path.rename(target)
    warn(f"moved to {target}; delete it when you do not need it any more")


def _of_first_process(step: int) -> int:
    """The step that process 0 gives, in all processes."""
    if jax.process_count() == 1:
        return step
    _wait_for_all()
    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def _wait_for_all() -> None:
    # Not a collective on the devices, which would wait only for a short time.
    everybody = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(next(_barrier_names), timeout=_TIMEOUT_S, processes=everybody)
