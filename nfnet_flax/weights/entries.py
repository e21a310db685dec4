"""Matches stored arrays with those of a network; all problems are collected before anything is loaded."""

import dataclasses
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError, require
from nfnet_flax.models.params import split
from nfnet_flax.progress import track

HostArrays = dict[str, np.ndarray]
_LISTED = 3
"""Largest number of problems of one kind that are listed one by one; if there are more, they are counted by layer."""
_LAYERS = 8
"""Largest number of layers whose problems are counted in a message."""


def _same(value: np.ndarray) -> np.ndarray:
    return value


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a network, and its name and layout in another format."""

    ours: str
    """Our name, such as `stages.0.1.conv0.kernel`."""
    theirs: str
    """The format's name."""
    shape: tuple[int, ...]
    """Shape in the format's layout."""
    to_ours: Callable[[np.ndarray], np.ndarray] = _same
    """Converts from the format's layout to ours."""
    to_theirs: Callable[[np.ndarray], np.ndarray] = _same
    """Converts from our layout to the format's."""


class DoesNotFit(ConfigError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """Stored arrays are not those of a network. The message ends with the advice for Python code; a command that has no
    such options makes its own of the attributes."""

    def __init__(self, said: str, lines: Sequence[str]) -> None:
        """Makes the message.

        Args:
          said: what does not fit.
          lines: the entries that differ, as far as they are listed.
        """
        advice = "another variant? name another model, or leave entries out with skip"
        super().__init__(f"{said} ({advice}):\n" + "\n".join(f"  {line}" for line in lines))
        self.said = said
        self.lines = tuple(lines)


def arrays_of(model: nnx.Module) -> HostArrays:
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
      ConfigError: `skip` is a single text, whose characters would be taken for patterns; a pattern matches nothing; or
        the patterns match everything.
    """
    require(not isinstance(skip, str), "skip", skip, f"give a tuple of patterns, such as ({skip!r},)")
    for pattern in skip:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"skip: pattern {pattern!r} matches no parameter; names look like {names[0]!r}")
    found = {name for pattern in skip for name in fnmatch.filter(names, pattern)}
    if len(found) == len(names):
        raise ConfigError(
            f"skip: the patterns {', '.join(map(repr, skip))} leave out all {len(names)} parameters, so nothing would "
            "be loaded: give patterns that match fewer, or give no weights"
        )
    return found


class Problem(NamedTuple):
    """The reason why an array cannot be loaded."""

    kind: str
    """Kind of problem, such as `missing`."""
    name: str
    """The format's name of the array."""
    detail: str
    """What was found and what was expected."""


def read_entries(
    source: str, model: nnx.Module, entries: Sequence[Entry], given: Mapping[str, Any], skip: Sequence[str]
) -> HostArrays:
    """Arrays in our layout and types, by our names.

    Args:
      source: description of where the arrays come from, for the message of an error.
      model: the network; it may be abstract (`nnx.eval_shape`).
      entries: one entry for each array of the network.
      given: the format's name -> array.
      skip: shell-style patterns of our names that are left out, such as `head.*` for a head of another size.

    Raises:
      ConfigError: `skip` is wrong (see `skipped`); or entries are missing, unexpected, not numbers, not finite, not
        exactly representable, or have a wrong shape. The message counts all of them and names the first of each kind.
    """
    types = {name: dtype for name, (_, dtype) in shapes_of(model).items()}
    left_out = skipped([entry.ours for entry in entries], skip)
    wanted = [entry for entry in entries if entry.ours not in left_out]
    known = {entry.theirs for entry in entries}
    problems = [Problem("missing", entry.theirs, f"{entry.shape}") for entry in wanted if entry.theirs not in given]
    problems += [Problem("unexpected", name, f"{np.shape(given[name])}") for name in given if name not in known]
    found: HostArrays = {}
    for entry in track(wanted, f"comparing the arrays of {source}", "arrays"):
        if entry.theirs in given:
            value = np.asarray(given[entry.theirs])
            problem = _problem(value, entry, types[entry.ours])
            if problem is not None:
                problems.append(problem)
            else:
                found[entry.ours] = entry.to_ours(value).astype(types[entry.ours])
    if problems:
        said = f"{source} does not fit the model: {len(problems)} of {len(entries)} entries differ"
        raise DoesNotFit(said, summary(problems))
    return found


def _problem(value: np.ndarray, entry: Entry, dtype: np.dtype) -> Problem | None:
    if value.shape != entry.shape:
        return Problem("misshaped", entry.theirs, f"is {value.shape}, expected {entry.shape}")
    if value.dtype.kind not in "fiuV" or value.dtype.hasobject:
        return Problem("not a number", entry.theirs, f"is of type {value.dtype}")
    # `V` is NumPy's kind for bfloat16 and similar types, which can be converted to float32 exactly.
    wide = value.astype(np.float64) if value.dtype.kind != "i" else value
    if not np.all(np.isfinite(wide)):
        num_bad = np.count_nonzero(~np.isfinite(wide))
        return Problem("not finite", entry.theirs, f"holds {num_bad} NaN or infinite values")
    if not np.array_equal(wide, wide.astype(dtype)):
        detail = f"has values of type {value.dtype} that {dtype} cannot hold: round them first"
        return Problem("not exact", entry.theirs, detail)
    return None


def summary(problems: Sequence[Problem]) -> list[str]:
    """A few lines that describe problems: each one of a rare kind, and for a frequent kind the number in each layer."""
    lines = []
    for kind in dict.fromkeys(problem.kind for problem in problems):
        alike = [problem for problem in problems if problem.kind == kind]
        if len(alike) <= _LISTED:
            lines += [f"{kind}: {problem.name} {problem.detail}" for problem in alike]
            continue
        layers = Counter(_layer(problem.name) for problem in alike).most_common()
        counts = ", ".join(f"{layer} {count}" for layer, count in layers[:_LAYERS])
        more = f", {len(layers) - _LAYERS} more layers" if len(layers) > _LAYERS else ""
        lines.append(f"{kind}: {len(alike)} ({counts}{more}), such as {alike[0].name} {alike[0].detail}")
    return lines


def _layer(name: str) -> str:
    """Layer of an array: `stages` for `stages.0.1.conv1.weight`, `nf_block` for `NFNet/~/nf_block_3/~/conv0/w`."""
    module = name.split("/~/")[1].split("/")[0] if "/~/" in name else name.split(".")[0]
    return re.sub(r"_\d+$", "", module)


def with_channels(arrays: HostArrays, shapes: Mapping[str, tuple[int, ...]]) -> HostArrays:
    """Arrays of a network for images in colour, for the same network with another number of image channels.

    As in timm, a kernel that reads the images is summed over the colours for one channel; for several channels the
    colours are repeated and divided by the number of repetitions. It is a start for training: a standardized kernel
    does not give the same result afterwards.

    Args:
      arrays: our name -> array.
      shapes: our name -> shape of the wanted array.
    """
    return {name: _for_channels(value, shapes.get(name, ())) for name, value in arrays.items()}


def _for_channels(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    colours = value.shape[2] if value.ndim == 4 else 0
    if colours != 3 or value.ndim != len(shape) or value.shape[:2] + value.shape[3:] != shape[:2] + shape[3:]:
        return value
    channels = shape[2]
    if channels == 1:
        return np.sum(value, axis=2, keepdims=True)
    repeated = np.tile(value, (1, 1, -(-channels // colours), 1))[:, :, :channels]
    return repeated * np.asarray(colours / channels, value.dtype)


def write_entries(entries: Sequence[Entry], arrays: HostArrays) -> HostArrays:
    """Arrays in the format's layout, by the format's names."""
    return {entry.theirs: np.asarray(entry.to_theirs(arrays[entry.ours]), order="C") for entry in entries}
