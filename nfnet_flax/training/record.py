"""Reads the records in a run's folder: classes, input, initial weights, and whether the run has trained."""

from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import read_json
from nfnet_flax.training import layout
from nfnet_flax.training.layout import steps_in
from nfnet_flax.training.storage import storage_errors


def has_trained(workdir: Path) -> bool:
    """Whether a folder contains results of a step: a checkpoint or metrics, also if they were found damaged.

    Raises:
      StorageFailed: the folder cannot be read.
    """
    if any(steps_in(workdir / kind) for kind in layout.CHECKPOINT_KINDS):
        return True
    metrics = workdir / layout.METRICS
    with storage_errors(workdir, OSError):
        return (workdir / layout.SET_ASIDE).exists() or (metrics.exists() and metrics.stat().st_size > 0)


def stored_class_names(workdir: Path) -> tuple[str, ...] | None:
    """Class names of a run, in the order of its labels; None if no run has begun.

    Raises:
      ConfigError: the file is damaged.
    """
    path = workdir / layout.CLASSES
    if not path.exists():
        return None
    remedy = "put it back from a copy; every reader of this run needs it"
    stored = read_json(path, remedy)
    names = stored.get("class_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{str(path)!r} holds no class names: {remedy}")
    return tuple(names)


def fixed_class_names(workdir: Path) -> tuple[str, ...] | None:
    """The class names that a start has to use; None if nothing was trained yet.

    Raises:
      ConfigError: as for `stored_class_names`.
      StorageFailed: as for `has_trained`.
    """
    names = stored_class_names(workdir)  # read in any case, so that a damaged file is reported
    return names if has_trained(workdir) else None


def stored_input(workdir: Path) -> dict[str, Any]:
    """The record of the run's input (`pipeline.input_identity`).

    Raises:
      ConfigError: the file is missing or damaged.
    """
    path = workdir / layout.INPUT
    remedy = "put it back from a copy, or start in a new workdir"
    record = read_json(path, remedy)
    if not all(isinstance(record.get(name), dict) for name in ("source", "eval_source")):
        raise ConfigError(f"{str(path)!r} does not say what the run was trained on: {remedy}")
    return record


def stored_initial(workdir: Path) -> dict[str, str] | None:
    """The record of the weights that a run began with (`initial.InitialWeights`); None if there is no record.

    Raises:
      ConfigError: the file is damaged.
    """
    path = workdir / layout.INITIAL
    if not path.exists():
        return None
    remedy = "put it back from a copy, or start in a new workdir"
    record = read_json(path, remedy)
    if not all(isinstance(record.get(name), str) for name in ("source", "content")):
        raise ConfigError(f"{str(path)!r} does not say which weights the run began with: {remedy}")
    return record
