"""Reads `agc.jsonl`, in which a run records what adaptive gradient clipping does in each layer."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.telemetry.json_lines import read_lines, wrong_format
from nfnet_flax.telemetry.layers import LINE_BEGINS

_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.(.+)")
_NUM_VALUES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecords:
    """What clipping did in each clipped parameter, in the order of the network, at the steps that are on record.

    Arrays are float64 of shape (parameters, steps), and NaN where a step has no finite number for a parameter.
    """

    steps: np.ndarray
    """Steps on record, in order: int64, (steps,)."""
    names: tuple[str, ...]
    """Names of the parameters."""
    fraction: np.ndarray
    """Share of the parameter's units whose gradient was scaled down, 0 to 1."""
    median_ratio: np.ndarray
    """Median over the units of the gradient's norm divided by that of the parameters."""
    largest_ratio: np.ndarray
    """Largest of these ratios."""
    unread_lines: tuple[int, ...] = ()
    """Numbers, from 1, of lines that cannot be read: cut short by a kill, or damaged."""

    def rows(self) -> list["LayerRow"]:
        """A summary of each parameter over all steps; one without a finite number has none."""
        arrays = np.stack([self.fraction, self.median_ratio, self.largest_ratio])
        known = np.flatnonzero(np.isfinite(arrays).any(axis=2).all(axis=0))
        return [
            LayerRow(
                name=self.names[index],
                mean_fraction=float(np.nanmean(self.fraction[index])),
                median_ratio=float(np.nanmedian(self.median_ratio[index])),
                largest_ratio=float(np.nanmax(self.largest_ratio[index])),
            )
            for index in known
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What clipping did in one parameter over all steps on record."""

    name: str
    mean_fraction: float
    """Mean over the steps of the share of clipped units."""
    median_ratio: float
    """Median over the steps of the median ratio."""
    largest_ratio: float
    """Largest ratio of any unit at any of the steps."""


def read_layers(path: Path) -> LayerRecords:
    """Reads an `agc.jsonl`, also of a run that is training. If a step is there twice, the later line counts.

    Args:
      path: the file; if it does not exist, there are no steps.

    Raises:
      ConfigError: a line is complete, but not in the format of this version; or a folder has the name of the file.
      StorageFailed: the file cannot be opened or read.
    """
    lines, unread = read_lines(path, LINE_BEGINS)
    by_step: dict[int, dict[str, list[float]]] = {}
    for number, data in lines:
        step, layers = data.get("step"), data.get("layers")
        if type(step) is not int or step < 0:
            raise wrong_format(path, number, f"step = {step!r}")
        if not isinstance(layers, dict):
            raise wrong_format(path, number, f"layers = {layers!r}")
        for name, values in layers.items():
            if not _is_measured(values):
                raise wrong_format(path, number, f"layers.{name} = {values!r}")
        by_step[step] = layers
    steps = sorted(by_step)
    names = in_order(dict.fromkeys(name for step in steps for name in by_step[step]))
    values = np.full((_NUM_VALUES, len(names), len(steps)), np.nan)
    index = {name: row for row, name in enumerate(names)}
    for column, step in enumerate(steps):
        for name, found in by_step[step].items():
            values[:, index[name], column] = [np.nan if value is None else value for value in found]
    values[~np.isfinite(values)] = np.nan
    return LayerRecords(
        steps=np.asarray(steps, np.int64),
        names=names,
        fraction=values[0],
        median_ratio=values[1],
        largest_ratio=values[2],
        unread_lines=tuple(unread),
    )


def _is_measured(values: Any) -> bool:
    """Whether a value is three numbers; None and infinity stand for a gradient that is not finite."""
    return (
        isinstance(values, list)
        and len(values) == _NUM_VALUES
        and all(value is None or type(value) in (int, float) for value in values)
    )


def place_of(name: str) -> tuple[str, str]:
    """The part of the network in which a parameter is, such as `stage 0 block 1`, and its name within that part."""
    if (found := _BLOCK.fullmatch(name)) is not None:
        return f"stage {found[1]} block {found[2]}", found[3]
    first, dot, rest = name.partition(".")
    return (first, rest) if dot else (name, "")


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of parameters in the order in which the network uses them: stem, blocks, what follows them, head."""

    def rank(name: str) -> tuple[int, int, int]:
        if (found := _BLOCK.fullmatch(name)) is not None:
            return 1, int(found[1]), int(found[2])
        part = name.partition(".")[0]
        return (0 if part.startswith("stem") else 3 if part == "head" else 2), 0, 0

    return tuple(sorted(names, key=rank))
