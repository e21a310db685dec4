"""The curves of a report: which ones there are, and how many points of them are drawn."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from nfnet_flax.report.facts import RunFacts
from nfnet_flax.telemetry.goodput import Account

Style = Literal["solid", "dashed", "thin"]
Point = tuple[float, float]
_MAX_BUCKETS = 400
"""Largest number of intervals of the horizontal axis from which a curve has two points each."""
_MIN_BUCKETS = 60
_MAX_RUNS_WITH_ALL = 2
_UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_MAX_VALUE = 1e300
"""Larger numbers, and those that are not finite, are not drawn."""
_MIN_MARKED = 40
"""A curve with fewer points shows each of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    colour: int
    """Number of its colour, from 0."""
    style: Style
    parts: tuple[tuple[Point, ...], ...]
    """Points that are joined, in order; between two parts, a value is missing."""

    @property
    def is_marked(self) -> bool:
        """Whether each point is marked, as there are few."""
        return sum(map(len, self.parts)) < _MIN_MARKED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What a colour and a style of a chart's curves mean."""

    label: str
    colour: int | None
    """None: curves of every colour are meant."""
    style: Style


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves with common axes. If there are several runs, each has a colour, otherwise each metric has one."""

    title: str
    x_label: str
    y_unit: Literal["number", "percent"]
    curves: tuple[Curve, ...]
    legend: tuple[Entry, ...]
    level: tuple[str, float] | None = None
    """A horizontal line: what it is, and its value."""


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A chart of metrics against steps."""

    title: str
    metrics: tuple[tuple[str, str, Style], ...]
    """Name of a metric, label and style."""
    y_unit: Literal["number", "percent"] = "number"


_WANTED = (
    _Wanted(
        "Loss",
        (("train/loss", "train", "thin"), ("eval/loss", "held-out, raw", "dashed"), ("eval_ema/loss", "EMA", "solid")),
    ),
    _Wanted(
        "Top-1 accuracy",
        (("train/top1", "train", "thin"), ("eval/top1", "held-out, raw", "dashed"), ("eval_ema/top1", "EMA", "solid")),
        "percent",
    ),
    _Wanted(
        "Top-5 accuracy",
        (("train/top5", "train", "thin"), ("eval/top5", "held-out, raw", "dashed"), ("eval_ema/top5", "EMA", "solid")),
        "percent",
    ),
    _Wanted("Norm of the gradient", (("train/grad_norm", "gradient", "solid"),)),
    _Wanted("Learning rate", (("train/learning_rate", "learning rate", "solid"),)),
    _Wanted("Units clipped by AGC", (("agc/clipped_fraction", "share of all units", "solid"),), "percent"),
)


def charts_of(runs: Sequence[RunFacts]) -> list[Chart]:
    """The charts of one or several runs; those for which nothing is on record are left out."""
    num_buckets = max(_MIN_BUCKETS, _MAX_BUCKETS * _MAX_RUNS_WITH_ALL // max(_MAX_RUNS_WITH_ALL, len(runs)))
    charts = []
    for wanted in _wanted(runs):
        curves, legend = [], []
        for rank, (metric, label, style) in enumerate(wanted.metrics):
            found = [
                _curve(rank if len(runs) == 1 else index, style, *run.column(metric), num_buckets)
                for index, run in enumerate(runs)
            ]
            curves += found
            if any(curve.parts for curve in found):
                legend.append(Entry(label=label, colour=rank if len(runs) == 1 else None, style=style))
        charts.append(_chart(wanted.title, "step", curves, legend, y_unit=wanted.y_unit, level=_level(runs, wanted)))
    charts.insert(min(3, len(charts)), _throughput(runs, num_buckets))
    charts.insert(min(4, len(charts)), _progress(runs, num_buckets))
    return [chart for chart in charts if chart.curves]


def _chart(
    title: str,
    x_label: str,
    curves: Sequence[Curve],
    legend: Sequence[Entry] = (),
    *,
    y_unit: Literal["number", "percent"] = "number",
    level: tuple[str, float] | None = None,
) -> Chart:
    """A chart of those curves that have points; a legend of one entry would say what the title says."""
    drawn = tuple(curve for curve in curves if curve.parts)
    entries = tuple(legend) if len(legend) > 1 else ()
    return Chart(title=title, x_label=x_label, y_unit=y_unit, curves=drawn, legend=entries, level=level)


def _wanted(runs: Sequence[RunFacts]) -> list[_Wanted]:
    """The charts, with one of the metric by which the best checkpoint is chosen, if it is another one."""
    found = list(_WANTED)
    known = {metric for wanted in _WANTED for metric, _, _ in wanted.metrics}
    best = dict.fromkeys(run.recipe.checkpoint.best_metric for run in runs if run.recipe is not None)
    for metric in best:
        if metric not in known:
            name = metric.partition("/")[2]
            metrics: tuple[tuple[str, str, Style], ...] = (
                (f"eval/{name}", "held-out, raw", "dashed"),
                (f"eval_ema/{name}", "EMA", "solid"),
            )
            found.insert(2, _Wanted(name.replace("_", " "), metrics))
    return found


def _level(runs: Sequence[RunFacts], wanted: _Wanted) -> tuple[str, float] | None:
    """The published accuracy, if all runs have the same network and it is on record."""
    names = {metric.partition("/")[2] for metric, _, _ in wanted.metrics}
    found = {run.published for run in runs}
    published = found.pop() if len(found) == 1 else None
    if published is None or not names & {"top1", "top5"}:
        return None
    value = published[1].top1_percent if "top1" in names else published[1].top5_percent
    return None if value is None else ("published", value / 100)


def _throughput(runs: Sequence[RunFacts], num_buckets: int) -> Chart:
    """Images per second; against time if it is on record for all runs when a step was done, otherwise against steps."""
    found = [run.column("throughput/images_per_s") for run in runs]
    x_label = "step"
    placed: list[tuple[Sequence[float], Sequence[float | None]]] = [*found]
    accounts = [run.account for run in runs if run.account is not None]
    if len(accounts) == len(runs):
        unit, unit_s = _unit(accounts)
        x_label = f"{unit} since the start of the run"
        placed = [
            _at_times(_done(account, unit_s), steps, values)
            for account, (steps, values) in zip(accounts, found, strict=True)
        ]
    curves = [_curve(index, "solid", xs, ys, num_buckets) for index, (xs, ys) in enumerate(placed)]
    return _chart("Images per second", x_label, curves)


def _unit(accounts: Sequence[Account]) -> tuple[str, float]:
    """Unit of time in which the longest run takes a few, and its length in seconds."""
    longest_s = max((account.wall_s for account in accounts), default=0.0)
    return next((unit, length_s) for unit, length_s in _UNITS if longest_s >= 2 * length_s or length_s == 1)


def _at_times(
    done: Sequence[Sequence[tuple[float, int]]], steps: Sequence[int], values: Sequence[float | None]
) -> tuple[list[float], list[float | None]]:
    """Times at which steps were done that count, with their values, and None between two sessions.

    Args:
      done: result of `_done`.
      steps: the steps, in order; those that are not on record are left out.
      values: a value for each step.
    """
    kept: list[tuple[int, float, int]] = []  # step, time, session
    for session, lines in enumerate(done):
        for time, step in lines:
            while kept and kept[-1][0] > step:  # these were lost
                kept.pop()
            if not kept or kept[-1][0] < step:
                kept.append((step, time, session))
    known = [step for step, _, _ in kept]
    if not known:
        return [], []
    times = np.interp(steps, known, [time for _, time, _ in kept])
    found: list[tuple[float, float | None]] = []
    last = None
    for step, time, value in zip(steps, times, values, strict=True):
        if not known[0] <= step <= known[-1]:
            continue
        session = kept[int(np.searchsorted(known, step))][2]
        found += [] if last in (None, session) else [(float(time), None)]
        found.append((float(time), value))
        last = session
    return [time for time, _ in found], [value for _, value in found]


def _done(account: Account, unit_s: float) -> list[list[tuple[float, int]]]:
    """For each session, times since the start of the run, and the number of updates done then."""
    begin_s = account.sessions[0].session.began_at_s
    return [
        [((line.at_s - begin_s) / unit_s, line.step) for line in one.session.lines if line.event != "start"]
        for one in account.sessions
        if one.session.from_step is not None
    ]


def _progress(runs: Sequence[RunFacts], num_buckets: int) -> Chart:
    """Steps against time; it is interrupted between sessions, and begins lower after steps were lost."""
    unit, unit_s = _unit([run.account for run in runs if run.account is not None])
    curves = []
    for index, run in enumerate(runs):
        times: list[float] = []
        steps: list[float | None] = []
        for lines in [] if run.account is None else _done(run.account, unit_s):
            times += [time for time, _ in lines] + [lines[-1][0]]
            steps += [step for _, step in lines] + [None]
        curves.append(_curve(index, "solid", times, steps, num_buckets))
    return _chart("Steps done", f"{unit} since the start of the run", curves)


def _curve(colour: int, style: Style, xs: Sequence[float], ys: Sequence[float | None], num_buckets: int) -> Curve:
    return Curve(colour=colour, style=style, parts=thinned(xs, ys, num_buckets))


def thinned(xs: Sequence[float], ys: Sequence[float | None], num_buckets: int) -> tuple[tuple[Point, ...], ...]:
    """A curve with few points that looks like the whole one: the lowest and the highest value of each interval.

    Args:
      xs: horizontal positions, in order.
      ys: values; None, or a number that cannot be drawn, interrupts the curve.
      num_buckets: number of equal intervals of the horizontal axis.

    Returns:
      The parts of the curve between interruptions, each with at least one point. The first and the last point of each
      are kept.
    """
    parts: list[list[Point]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if y is not None and abs(y) <= _MAX_VALUE:
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    width = (xs[-1] - xs[0]) / num_buckets if len(xs) > 1 else 0.0
    return tuple(tuple(_extremes(part, width)) for part in parts if part)


def _extremes(points: list[Point], width: float) -> list[Point]:
    if width <= 0 or len(points) <= 2:
        return points
    start, kept = points[0][0], [points[0]]
    bucket: list[Point] = []
    number = 0
    for point in points[1:]:
        its = int((point[0] - start) / width)
        if its != number:
            kept += _ends(bucket)
            bucket, number = [], its
        bucket.append(point)
    kept += _ends(bucket)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _ends(bucket: list[Point]) -> list[Point]:
    """The lowest and the highest point, in their order."""
    if not bucket:
        return []
    low, high = min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])
    return [low] if low == high else sorted((low, high), key=lambda point: point[0])
