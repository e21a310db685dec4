"""What adaptive gradient clipping does in each layer of a run: `agc.jsonl` in its folder.

Each line is a JSON object: `step`, and `layers`: name of each parameter that is clipped -> the share of its units whose
gradient was scaled down, the median and the largest ratio of their gradient's norm to their own norm. After a resume,
each step is there once.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed, write_whole
from nfnet_flax.messages import warn
from nfnet_flax.optim.agc_statistics import ClippedUnits
from nfnet_flax.telemetry.json_lines import read_lines

LINE_BEGINS = b'{"step"'
_NUM_LINES = 200
"""About so many lines has the record of a run, if its recipe does not say otherwise."""
_LONG_STEPS = 500
_LONG_LINES = 20
"""Clipping of everything or of nothing is long if it lasts for so many steps, and so many log steps."""
_NEARLY_ALL = 0.9
_FLUSH_S = 20.0
"""What is older is in the file, in seconds, although no checkpoint has been saved."""


def is_due(step: int, num_steps: int, log_every_steps: int, layers_every_steps: int | None) -> bool:
    """Whether layers are recorded at a log step."""
    if layers_every_steps is not None:
        return step % layers_every_steps == 0
    return step % (log_every_steps * max(1, math.ceil(num_steps / (_NUM_LINES * log_every_steps)))) == 0


class LayerLog:
    """Writes the record of a run. If it cannot be written, this is said once, and the run goes on without it."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Removes what an earlier process wrote for steps after `resume_step`, which will be repeated."""
        self._path = path
        self._lines: list[bytes] = []
        self._flushed_s = time.monotonic()
        self._has_failed = False
        try:
            lines, damaged = read_lines(path, LINE_BEGINS)
            kept = [row for _, row in lines if type(row.get("step")) is int and row["step"] <= resume_step]
            if damaged or len(kept) < len(lines) or not _ends_a_line(path):
                write_whole(path, b"".join(map(_line, kept)))
        except (OSError, ConfigError, StorageFailed) as error:
            self._fail(error)

    def write(self, step: int, layers: Mapping[str, ClippedUnits]) -> None:
        """Adds what happened in a step."""
        values = {
            name: [float(f"{value:.4g}") for value in dataclasses.astuple(units)] for name, units in layers.items()
        }
        self._lines.append(json.dumps({"step": step, "layers": values}).encode() + b"\n")
        if time.monotonic() - self._flushed_s >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Appends to the file; to be called before a checkpoint is saved."""
        self._flushed_s = time.monotonic()
        if not self._lines or self._has_failed:
            return
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(self._lines))
        except OSError as error:
            self._fail(error)
        self._lines.clear()

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        warn(f"{self._path} cannot be written ({error}): what is missing there, nfnet agc cannot show")


def _rounded(value: float) -> float | None:
    """Four digits of a number, as a file with more of them would be much larger; None if it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _ends_a_line(path: Path) -> bool:
    """Whether a file is missing, empty, or ends with a whole line."""
    return not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")


class ClippingWatch:
    """Warns once if nearly all gradients, or none at all, have been clipped for a long time."""

    def __init__(self) -> None:
        self._since: tuple[str, int] | None = None
        self._num_lines = 0
        self._has_warned = False

    def notice(self, step: int, clipped_fraction: float, ratio: float) -> None:
        """Takes the share of clipped units of a log step; `ratio` is lambda."""
        kind = "all" if clipped_fraction > _NEARLY_ALL else "none" if clipped_fraction == 0 else ""
        if self._since is None or self._since[0] != kind:
            self._since, self._num_lines = (kind, step), 0
        self._num_lines += 1
        is_long = step - self._since[1] >= _LONG_STEPS and self._num_lines >= _LONG_LINES
        if not kind or not is_long or self._has_warned:
            return
        self._has_warned = True
        if kind == "all":
            warn(
                f"adaptive gradient clipping has scaled down more than {_NEARLY_ALL:.0%} of all units since step "
                f"{self._since[1]}, so the length of the gradient hardly matters: give a larger "
                f"--optim.clipping.ratio (it is {ratio:g}), or a lower learning rate"
            )
        else:
            warn(
                f"adaptive gradient clipping has not scaled down any unit since step {self._since[1]}: it has no "
                f"effect on this run; give a smaller --optim.clipping.ratio (it is {ratio:g}) if it shall have one"
            )
