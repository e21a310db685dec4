"""The picture of measured signals: the three published metrics over the depth of the network."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from nfnet_flax.plots import Kind, picture_file
from nfnet_flax.telemetry.signal import SignalPropagation
from nfnet_flax.telemetry.signal_table import Series

_COLOURS = ("#0072b2", "#d55e00")
_CLOSED_FORM = "#555555"
_LOG_FROM = 30.0
"""A panel is logarithmic if its largest value is so many times its smallest one."""
_DPI = 110
_MARKERS_UP_TO = 60
"""Number of blocks up to which each has a marker."""


class _Line(NamedTuple):
    """A line of a panel."""

    label: str
    values: Sequence[float]
    """One for each block, or with the stem before them."""
    style: dict[str, Any]
    """Arguments of `Axes.plot`."""


def signal_picture(kind: Kind, title: str, measured: Sequence[Series]) -> bytes:
    """The content of a picture file.

    Args:
      kind: kind of the file.
      title: network and input.
      measured: what was measured, with one or two sets of parameters of the same network.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained", dpi=_DPI)
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = figure.subplots(3, 1, sharex=True)
    signal = measured[0].signal
    for axes, (heading, lines) in zip(panels, _panels(measured).items(), strict=True):
        _draw(axes, heading, lines, len(signal.blocks))
        _mark_stages(axes, signal, named=axes is panels[0])
    panels[-1].set_xlabel("block (0: the output of the stem)")
    by_label = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    by_label = {label: line for label, line in by_label.items() if not label.startswith("_")}  # lines between stages
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=1, fontsize=9, frameon=False)
    return picture_file(figure, kind)


def _panels(measured: Sequence[Series]) -> dict[str, list[_Line]]:
    """The heading of each panel, and its lines."""
    means: list[_Line] = []
    variances: list[_Line] = []
    branches: list[_Line] = []
    blocks = measured[0].signal.blocks
    marker = "o" if len(blocks) <= _MARKERS_UP_TO else ""
    for (parameters, signal), colour in zip(measured, _COLOURS, strict=False):
        label = parameters.replace("$", r"\$")  # no formula
        solid = {"color": colour, "linewidth": 1.4, "marker": marker, "markersize": 3.5}
        means.append(_Line(label, [signal.stem_sq_mean, *(block.avg_sq_mean for block in signal.blocks)], solid))
        variances.append(_Line(label, [signal.stem_var, *(block.avg_var for block in signal.blocks)], solid))
        branches.append(_Line(label, [block.res_avg_var for block in signal.blocks], solid))
    expected = [block.expected_var for block in blocks if block.expected_var is not None]
    if expected:
        dashed = {"color": _CLOSED_FORM, "linestyle": "--", "linewidth": 1.1}
        label = "closed form for skip gains of 1"
        variances.append(_Line(label, [1.0, *expected], dashed))
        branches.append(_Line(label, [1.0 for _ in expected], dashed))
    return {
        "squared channel mean\nafter the addition": means,
        "channel variance\nafter the addition": variances,
        "channel variance at the\nend of the branch": branches,
    }


def _draw(axes: Any, heading: str, lines: Sequence[_Line], num_blocks: int) -> None:
    """Draws one panel. The scale is linear from 0, or logarithmic if the values differ much."""
    for line in lines:
        axes.plot(range(num_blocks + 1 - len(line.values), num_blocks + 1), line.values, label=line.label, **line.style)
    positive = [value for line in lines for value in line.values if math.isfinite(value) and value > 0]
    if positive and max(positive) >= _LOG_FROM * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * max(positive, default=1.0))
    axes.set_ylabel(heading, fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_stages(axes: Any, signal: SignalPropagation, *, named: bool) -> None:
    """Draws a vertical line before each stage, and writes its name above the panel if `named`."""
    stages = [block.stage for block in signal.blocks]
    axes.set_xlim(-0.5, len(stages) + 0.5)
    for stage in sorted(set(stages)):
        first = stages.index(stage) + 1
        axes.axvline(first - 0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
        if named:
            middle = first + (stages.count(stage) - 1) / 2
            axes.annotate(f"stage {stage}", (middle, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
