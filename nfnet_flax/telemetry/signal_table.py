"""Measured signals as a table, as CSV and as JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from nfnet_flax import columns
from nfnet_flax.telemetry.signal import SignalPropagation
from nfnet_flax.units import as_float32

_COLUMNS = ("beta", "avg_sq_mean", "avg_var", "expected_var", "res_avg_var", "branch_factor")
"""Numbers of a block in the order of the table, by their names in `BlockSignal`."""
_HEADINGS = ("block", "beta", "sq. mean", "variance", "closed form", "of branch", "factor")
_WIDTH = 13
STEM = "stem"
"""Name of the row of the stem's output."""


class Series(NamedTuple):
    """What was measured with one set of parameters."""

    parameters: str
    """Which parameters."""
    signal: SignalPropagation
    """The signal."""


def table(series: Series, *, on_noise: bool) -> str:
    """A table with a row for the stem and for each block, and below it what must be known to read it.

    Args:
      series: what was measured.
      on_noise: whether it was measured on noise.
    """
    signal = series.signal
    rows = [_HEADINGS, *((row["block"], *(_text(row[name]) for name in _COLUMNS)) for row in _rows(series))]
    name_width = max(columns.width_of(row[0]) for row in rows)
    lines = [
        f"{columns.left(name, name_width)}{''.join(columns.right(cell, _WIDTH) for cell in cells)}"
        for name, *cells in rows
    ]
    return "\n".join([f"{series.parameters}:", *lines, *notes(signal, on_noise=on_noise)])


def notes(signal: SignalPropagation, *, on_noise: bool) -> list[str]:
    """What must be known to read the numbers, a sentence for each."""
    found = []
    if signal.first_not_finite is not None:
        found.append(f"The signal is not finite from {signal.first_not_finite} on: values overflow there.")
    if signal.batch_norm == "batch":
        found.append("BatchNorm normalises with the statistics of these images, as it has no running ones yet.")
    if signal.blocks and all(block.branch_factor == 0 for block in signal.blocks):
        found.append("All skip gains are 0, so that no branch is added.")
    elif signal.blocks and all(block.res_avg_var == 0 for block in signal.blocks):
        found.append("All branches end in gains of 0, so that none is added.")
    if on_noise and signal.pools_in_shortcuts:
        found.append(
            "Shortcuts between stages average 2 x 2 places, which are nearly independent in noise: the variance falls "
            "to about a quarter, which the closed form leaves out."
        )
    return found


def csv_text(measured: Sequence[Series]) -> str:
    """A row for the stem and each block of each series, with the digits of float32; empty: there is no such number."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["parameters", "block", "stage", *_COLUMNS])
    for series in measured:
        for row in _rows(series):
            numbers = ("" if row[name] is None else as_float32(row[name]) for name in _COLUMNS)
            rows.writerow([series.parameters, row["block"], row["stage"], *numbers])
    return text.getvalue()


def json_text(network: str, images: str, measured: Sequence[Series]) -> str:
    """One object: `network`, `input`, and `series`, each with its `parameters` and `blocks`; a number that is not
    finite is null."""
    series = [
        {
            "parameters": each.parameters,
            "batch_norm": each.signal.batch_norm,
            "blocks": [{name: _finite(value) for name, value in row.items()} for row in _rows(each)],
        }
        for each in measured
    ]
    first = measured[0].signal
    described = {"network": network, "input": images, "num_images": first.num_images, "image_size": first.image_size}
    return json.dumps({**described, "series": series}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _rows(series: Series) -> list[dict[str, Any]]:
    """The stem, which has no branch, and the blocks."""
    signal = series.signal
    blank: dict[str, Any] = dict.fromkeys(("stage", *_COLUMNS))
    stem = blank | {"block": STEM, "avg_sq_mean": signal.stem_sq_mean, "avg_var": signal.stem_var}
    rows = [
        {"block": block.name, "stage": block.stage} | {n: getattr(block, n) for n in _COLUMNS}
        for block in signal.blocks
    ]
    return [stem, *rows]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return as_float32(value) if math.isfinite(value) else None
