"""Matching stored arrays with a network's: every problem is collected before anything is loaded."""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models.params import split

Arrays = dict[str, np.ndarray]


def _same(value: np.ndarray) -> np.ndarray:
    return value


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a network, and where and how a format keeps it."""

    ours: str
    """Our name, such as `stages.0.1.conv0.kernel`."""
    theirs: str
    """The format's name."""
    shape: tuple[int, ...]
    """In the format's layout."""
    to_ours: Callable[[np.ndarray], np.ndarray] = _same
    """From the format's layout to ours."""
    to_theirs: Callable[[np.ndarray], np.ndarray] = _same
    """From our layout to the format's."""


def arrays_of(model: nnx.Module) -> Arrays:
    """Parameters and running statistics of a network, by our names."""
    _, params, batch_stats = split(model)
    return {name: np.asarray(value) for name, value in (params | batch_stats).items()}


def shapes_of(model: nnx.Module) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of a network, by our names; the network may be abstract (`nnx.eval_shape`)."""
    _, params, batch_stats = split(model)
    return {name: (tuple(value.shape), np.dtype(value.dtype)) for name, value in (params | batch_stats).items()}


def skipped(names: Sequence[str], skip: Sequence[str]) -> set[str]:
    """Names that match a shell-style pattern of `skip`.

    Raises:
      ConfigError: a pattern matches nothing.
    """
    for pattern in skip:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"skip: pattern {pattern!r} matches no parameter; names look like {names[0]!r}")
    return {name for pattern in skip for name in fnmatch.filter(names, pattern)}


def read_entries(
    source: str, model: nnx.Module, entries: Sequence[Entry], given: Mapping[str, Any], skip: Sequence[str]
) -> Arrays:
    """Arrays in our layout and types, by our names.

    Args:
      source: where they come from, for the message of an error.
      model: the network; it may be abstract (`nnx.eval_shape`).
      entries: one for each of its arrays.
      given: arrays by the format's names.
      skip: shell-style patterns of our names that are left out, such as `head.*` for a head of another size.

    Raises:
      ConfigError: lists every entry that is missing, unexpected, misshaped, not a number, not finite or not exactly
        representable; nothing was loaded.
    """
    types = {name: dtype for name, (_, dtype) in shapes_of(model).items()}
    left_out = skipped([entry.ours for entry in entries], skip)
    wanted = [entry for entry in entries if entry.ours not in left_out]
    known = {entry.theirs for entry in entries}
    problems = [f"missing: {entry.theirs} {entry.shape}" for entry in wanted if entry.theirs not in given]
    problems += [f"unexpected: {name} {np.shape(given[name])}" for name in given if name not in known]
    found: Arrays = {}
    for entry in wanted:
        if entry.theirs in given:
            value = np.asarray(given[entry.theirs])
            problem = _problem(value, entry.shape, types[entry.ours])
            if problem is not None:
                problems.append(f"{problem[0]}: {entry.theirs} {problem[1]}")
            else:
                found[entry.ours] = entry.to_ours(value).astype(types[entry.ours])
    if problems:
        raise ConfigError(
            f"{source} does not fit the model: {len(problems)} of {len(entries)} entries differ "
            "(another variant? name another model, or leave entries out with skip):\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return found


def _problem(value: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> tuple[str, str] | None:
    if value.shape != shape:
        return "misshaped", f"is {value.shape}, expected {shape}"
    if value.dtype.kind not in "fiuV" or value.dtype.hasobject:
        return "not a number", f"is of type {value.dtype}"
    # `V` is how NumPy sees bfloat16 and its kin, which convert to float32 exactly.
    wide = value.astype(np.float64) if value.dtype.kind != "i" else value
    if not np.all(np.isfinite(wide)):
        return "not finite", f"holds {np.count_nonzero(~np.isfinite(wide))} NaN or infinite values"
    if not np.array_equal(wide, wide.astype(dtype)):
        return "not exact", f"has values of type {value.dtype} that {dtype} cannot hold: round them first"
    return None


def write_entries(entries: Sequence[Entry], arrays: Arrays) -> Arrays:
    """Arrays in the format's layout, by the format's names."""
    return {entry.theirs: np.asarray(entry.to_theirs(arrays[entry.ours]), order="C") for entry in entries}
