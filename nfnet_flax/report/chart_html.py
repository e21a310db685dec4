"""A chart as HTML: the curves are SVG that is stretched to the width of the screen, the labels are text beside it, so
that they keep their size."""

import math
from collections.abc import Callable, Iterable, Sequence

from nfnet_flax.html_page import escaped
from nfnet_flax.report.curves import Chart, Curve, Point

_WIDTH, _HEIGHT = 1000, 400
"""Size of the coordinates."""
_NUM_TICKS = 5
_NUM_COLOURS = 8

CHART_STYLE = """
:root { --c0: #2563c9; --c1: #c2570c; --c2: #15803d; --c3: #a21caf; --c4: #b3261e; --c5: #0e7490; --c6: #7a5c00;
  --c7: #475569; }
@media (prefers-color-scheme: dark) { :root { --c0: #7aa7f5; --c1: #fb923c; --c2: #4ade80; --c3: #e879f9; --c4: #ff8a80;
  --c5: #22d3ee; --c6: #facc15; --c7: #cbd5e1; } }
.charts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
.chart { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  min-width: 0; }
.chart figcaption { font-weight: 600; margin-bottom: .4rem; }
.legend { font-size: .78rem; font-weight: 400; color: var(--soft); }
.legend span { margin-right: .8rem; white-space: nowrap; max-width: 100%; overflow: hidden; text-overflow: ellipsis;
  display: inline-block; vertical-align: bottom; }
.legend i { display: inline-block; width: 1.3rem; border-top: 2.5px solid var(--c); vertical-align: middle;
  margin-right: .3rem; }
.legend i.dashed { border-top-style: dashed; } .legend i.thin { border-top-width: 1px; }
.legend + .charts { margin-top: .5rem; }
.plot { display: grid; padding-right: .8rem; grid-template-columns: 3.4rem minmax(0, 1fr);
  grid-template-rows: 11rem 1.2rem auto; font-size: .72rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.plot svg { width: 100%; height: 100%; overflow: visible; display: block; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round;
  stroke-linecap: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; } .plot .level { stroke: var(--text); stroke-dasharray: 2 4; }
.plot .dashed { stroke-dasharray: 5 4; } .plot .thin { stroke-width: 1; opacity: .65; }
.plot .dots { stroke-width: 5; }
.y, .x { position: relative; } .y span { position: absolute; right: .4rem; transform: translateY(50%); }
.x { grid-column: 2; } .x span { position: absolute; top: .2rem; transform: translateX(-50%); white-space: nowrap; }
.plot .name { grid-column: 2; text-align: center; }
"""


def chart_html(chart: Chart) -> str:
    """A figure with the curves, their axes and a legend."""
    points = [point for curve in chart.curves for part in curve.parts for point in part]
    level = [] if chart.level is None else [chart.level[1]]
    left, right = _range([x for x, _ in points])
    y_ticks = _ticks([*(y for _, y in points), *level])
    low, high = y_ticks[0], y_ticks[-1]
    x_ticks = [tick for tick in _ticks([left, right]) if left <= tick <= right]

    def at(point: Point) -> str:
        x, y = (point[0] - left) / (right - left), (point[1] - low) / (high - low)
        return f"{round(_WIDTH * x)} {round(_HEIGHT * (1 - y))}"

    lines = "".join(f"M{at((left, tick))}H{_WIDTH}" for tick in y_ticks)
    paths = [f'<path class="grid" d="{lines}"/>']
    if chart.level is not None:
        paths.append(f'<path class="level" d="M{at((left, chart.level[1]))}H{_WIDTH}"/>')
    paths += [_path(curve, at) for curve in chart.curves]
    y_labels = "".join(
        f'<span style="bottom:{100 * (tick - low) / (high - low):.1f}%">{_number(tick, y_ticks, chart.y_unit)}</span>'
        for tick in y_ticks
    )
    x_labels = "".join(
        f'<span style="left:{100 * (tick - left) / (right - left):.1f}%">{_number(tick, x_ticks, "number")}</span>'
        for tick in x_ticks
    )
    return (
        f'<figure class="chart"><figcaption>{escaped(chart.title)}{_legend(chart)}'
        f'</figcaption><div class="plot"><div class="y">{y_labels}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(chart.title)}">{"".join(paths)}</svg>'
        f'<div class="x">{x_labels}</div><div class="name">{escaped(chart.x_label)}</div></div></figure>\n'
    )


def _path(curve: Curve, at: Callable[[Point], str]) -> str:
    colour = f"--c:var(--c{curve.colour % _NUM_COLOURS})"
    lines = "".join(f"M{_joined(map(at, part))}" for part in curve.parts)
    found = f'<path class="{curve.style}" style="{colour}" d="{lines}"/>'
    if curve.is_marked:
        dots = "".join(f"M{at(point)}h0" for part in curve.parts for point in part)
        found += f'<path class="dots" style="{colour}" d="{dots}"/>'
    return found


def _joined(places: Iterable[str]) -> str:
    """Coordinates of a line, each once if several follow that are equal."""
    kept: list[str] = []
    for place in places:
        if not kept or place != kept[-1]:
            kept.append(place)
    return kept[0] + ("L" + " ".join(kept[1:]) if len(kept) > 1 else "h0")


def _legend(chart: Chart) -> str:
    found = [_entry(entry.label, entry.colour, entry.style) for entry in chart.legend]
    if chart.level is not None:
        name, value = chart.level
        found.append(_entry(f"{name} {value:.1%}", None, "dashed"))
    return f'<div class="legend">{"".join(found)}</div>' if found else ""


def runs_legend(labels: Sequence[str]) -> str:
    """The colours of several runs."""
    return f'<div class="legend">{"".join(_entry(label, index, "solid") for index, label in enumerate(labels))}</div>\n'


def _entry(label: str, colour: int | None, style: str) -> str:
    value = "text" if colour is None else f"c{colour % _NUM_COLOURS}"
    text = escaped(label)
    return f'<span title="{text}"><i class="{style}" style="--c:var(--{value})"></i>{text}</span>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers at equal distances, of which the first is not above the values and the last not below."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.5 * abs(low) or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float, ticks: Sequence[float], unit: str) -> str:
    """A tick as text, with as many digits as tell the ticks apart."""
    factor = 100.0 if unit == "percent" else 1.0
    step = factor * (ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0)
    largest = factor * max(map(abs, ticks))
    if largest >= 1e6 or largest < 1e-3:
        text = f"{factor * value:.3g}"
    else:
        text = f"{factor * value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return f"{text}%" if unit == "percent" else text
