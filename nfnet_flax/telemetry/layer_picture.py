"""A picture of what adaptive gradient clipping did: layers x steps, drawn by Matplotlib (extra `plots`)."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nfnet_flax.plots import Kind, picture_file
from nfnet_flax.telemetry.layer_records import LayerRecords, place_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_NAMED = 150
"""Largest number of parameters that are named one by one; of more, only the blocks are named."""
_INCHES_PER_NAME = 0.1
_INCHES_PER_ROW = 0.05
"""Height of the row of a parameter, with and without its name."""
_INCHES_HIGH = 4.0, 25.0
"""Smallest and largest height of the picture."""
_INCHES_AROUND = 1.6
"""Height of what is above and below the rows."""
_RATIO_DECADES = 4
"""Powers of ten of the ratio that the colours distinguish, half of them on each side of lambda."""


def layers_picture(records: LayerRecords, *, title: str, clipping: float, kind: Kind) -> bytes:
    """A picture with two panels: the share of clipped units, and the median ratio of gradient to parameters.

    Args:
      records: at least one step.
      title: text above the panels, taken as it is.
      clipping: lambda, the ratio above which a unit is clipped; it is the middle of the colours of the ratio.
      kind: kind of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    least, most = _INCHES_HIGH
    row = _INCHES_PER_NAME if len(records.names) <= _MAX_NAMED else _INCHES_PER_ROW
    height = min(most, max(least, _INCHES_AROUND + row * len(records.names)))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    edges = _edges(records.steps), np.arange(len(records.names) + 1)
    spread = 10 ** (_RATIO_DECADES / 2)
    panels: tuple[tuple[Axes, np.ndarray, str, dict[str, Any]], ...] = (
        (left, records.fraction, "share of clipped units", {"vmin": 0, "vmax": 1, "cmap": "viridis"}),
        (
            right,
            np.maximum(records.median_ratio, np.finfo(np.float32).tiny),
            f"median ratio of gradient to parameters (lambda {clipping:g})",
            {"norm": LogNorm(clipping / spread, clipping * spread), "cmap": "RdBu_r"},
        ),
    )
    for axes, values, label, colours in panels:
        # One image in an SVG file too: a path for each cell would make megabytes.
        mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(values), rasterized=True, **colours)
        axes.set_facecolor("0.8")  # not on record
        axes.set_xlabel("step")
        extend = "both" if axes is right else "neither"
        figure.colorbar(mesh, ax=axes, location="top", label=label, extend=extend, aspect=40, pad=0.2 / height)
        axes.tick_params(axis="y", length=0)
    left.invert_yaxis()
    _label_parts(left, right, records.names, (height - _INCHES_AROUND) / len(records.names))
    figure.suptitle(title, fontsize=11, parse_math=False)
    return picture_file(figure, kind)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Edges between the columns of steps, (steps + 1,): in the middle between two steps."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _label_parts(left: "Axes", right: "Axes", names: Sequence[str], row_inches: float) -> None:
    """Names the parts of the network at the left, and their parameters if there is room; draws lines between parts."""
    parts = [(part, list(ones)) for part, ones in itertools.groupby(names, lambda name: place_of(name)[0])]
    start, free, ticks, labels = 0, 0.0, [], []
    label_rows = _INCHES_PER_NAME / row_inches
    for part, ones in parts:
        if len(names) <= _MAX_NAMED:
            ticks += [start + index + 0.5 for index in range(len(ones))]
            labels += [f"{'' if index else part}   {place_of(name)[1]}" for index, name in enumerate(ones)]
        elif (middle := start + len(ones) / 2) - label_rows / 2 >= free:
            ticks.append(middle)
            labels.append(part)
            free = middle + label_rows / 2
        start += len(ones)
        for axes in (left, right):
            axes.axhline(start, color="white", linewidth=0.5)
    left.set_yticks(ticks, labels, fontsize=6, parse_math=False)
