"""A report as one HTML page that needs no other file, no network and no script."""

import base64
import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import numpy as np
from PIL import Image

import nfnet_flax
from nfnet_flax.html_page import END, escaped, page_head
from nfnet_flax.report import tables
from nfnet_flax.report.chart_html import CHART_STYLE, chart_html, runs_legend
from nfnet_flax.report.curves import charts_of
from nfnet_flax.report.facts import RunFacts, Topic
from nfnet_flax.report.recipe_changes import Fields
from nfnet_flax.report.tables import PART_TEXTS, Table
from nfnet_flax.telemetry.goodput import Account
from nfnet_flax.telemetry.layer_records import LayerRecords

_MAX_PICTURE_PX = 600
"""Largest width and height of the picture of the layers."""
_OPEN = {"Environment": False}
"""Title of a table -> whether it is open at first; the others are."""

_STYLE = """
:root { --p-productive: #2f9e6e; --p-repeated: #c2410c; --p-start: #7c8aa0; --p-restore: #4f7fc9; --p-compile: #8b6fd0;
  --p-input: #d29a17; --p-save: #3aa0b5; --p-evaluation: #b65f9f; --p-end: #a3a37a; --p-unrecorded: #9aa2af;
  --p-not_running: #c9ced6; }
@media (prefers-color-scheme: dark) { :root { --p-not_running: #464c57; } }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .6rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem; margin: 0 0 .8rem;
  min-width: 0; }
main { margin-top: .9rem; }
.cards { display: grid; gap: 0 .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  align-items: start; }
.cards > .wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; min-width: min(100%, 20rem); }
th, td { padding: .22rem .7rem .22rem 0; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } thead th { border-top: 0; vertical-align: bottom; max-width: 14rem; }
.t { text-align: left; overflow-wrap: break-word; } tbody .t { overflow-wrap: anywhere; }
tbody th.t { min-width: 6.5rem; } td.t { min-width: 5.8rem; max-width: 40rem; }
.wide tbody th.t { min-width: 0; overflow-wrap: break-word; }
td:not(.t) { white-space: nowrap; }
.note { color: var(--soft); font-size: .82rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
.missing { border-left: 3px solid var(--bad); padding-left: .5rem; color: var(--text); }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; }
.time { margin-bottom: .7rem; } .time p { margin: 0 0 .25rem; overflow-wrap: anywhere; } .time b { font-size: 1.05rem; }
.bar { display: flex; height: 1.5rem; border-radius: 6px; overflow: hidden; background: var(--track); }
.bar i { display: block; } .key { font-size: .8rem; color: var(--soft); margin: 0 0 .6rem; }
.key span { margin-right: .9rem; white-space: nowrap; display: inline-block; }
.key i { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .3rem;
  vertical-align: -1px; }
.layers { width: 100%; height: auto; min-height: 9rem; max-height: 30rem; image-rendering: pixelated;
  background: var(--track); border-radius: 6px; display: block; margin-top: .6rem; }
"""


def report_page(runs: Sequence[RunFacts], base: tuple[str, Fields] | None) -> str:
    """The whole report as HTML.

    Args:
      runs: at least one run, with different labels.
      base: name and fields of the recipe with which those of the runs are compared; None: with the defaults.
    """
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"report of {made} by nfnet_flax {nfnet_flax.__version__}"]
    return page_head(title, lines, style=CHART_STYLE + _STYLE) + "".join(_parts(runs, base)) + END


def _parts(runs: Sequence[RunFacts], base: tuple[str, Fields] | None) -> Iterator[str]:
    several = len(runs) > 1
    summary = _card(_table(tables.summary(runs), heads=several), is_wide=several)
    yield f'<main>\n<div class="cards">{summary}{_card("".join(_time(runs)), is_wide=several)}</div>\n'
    charts = charts_of(runs)
    if charts:
        key = runs_legend([run.label for run in runs]) if several else ""
        yield f'<h2>Curves</h2>\n{key}<div class="charts">{"".join(map(chart_html, charts))}</div>\n'
    compared = tables.recipes_compared(runs)
    if compared is not None:
        yield f"<h2>{escaped(compared.title)}</h2>\n{_card(_table(compared))}"
    for run in runs:
        heading = run.label if several else "Details"
        topics = (_topic(run, topic, table) for topic, table in tables.tables_of(run, base))
        yield f'<section><h2>{escaped(heading)}</h2>\n<div class="cards">{"".join(topics)}</div></section>\n'
    yield "</main>\n"


def _topic(run: RunFacts, topic: Topic, table: Table | None) -> str:
    note = run.note(topic)
    missing = "" if note is None else f'<p class="note missing">{escaped(f"{topic}: {note}")}</p>'
    if table is None:
        return _card(missing) if missing else ""
    picture = ""
    if topic == "clipping" and run.layers is not None:
        picture = _layers(run.layers)
    body = f"{missing}{_table(table)}{picture}"
    is_open = "" if _OPEN.get(table.title) is False else " open"
    details = f"<details{is_open}><summary>{escaped(table.title)}</summary>{body}</details>"
    return _card(details, is_wide=topic == "time")


def _card(content: str, *, is_wide: bool = False) -> str:
    return f'<div class="card{" wide" if is_wide else ""}">{content}</div>\n'


def _time(runs: Sequence[RunFacts]) -> Iterator[str]:
    """A bar for each run, their key, and the table with the numbers."""
    yield "<h3>Goodput: share of the time in which steps were computed that count</h3>"
    for run in runs:
        label = f"{escaped(run.label)}: " if len(runs) > 1 else ""
        if run.account is None:
            yield f'<p class="note missing">{label}{escaped(run.note("time") or "not recorded")}</p>'
        else:
            yield f'<div class="time"><p>{label}<b>{run.account.goodput:.1%}</b></p>{_bar(run.account)}</div>'
    known = [run.account for run in runs if run.account is not None]
    if not known:
        return
    used = [part for part in PART_TEXTS if any(account.seconds[part] > 0 for account in known)]
    key = (f'<span><i style="background:var(--p-{part})"></i>{escaped(PART_TEXTS[part])}</span>' for part in used)
    yield f'<p class="key">{"".join(key)}</p>{_table(tables.breakdown(runs))}'


def _bar(account: Account) -> str:
    pieces = []
    for part, text in PART_TEXTS.items():
        share = account.seconds[part] / max(account.wall_s, 1e-9)
        if share > 0:
            style = f"width:{100 * share:.3f}%;background:var(--p-{part})"
            pieces.append(f'<i style="{style}" title="{escaped(text)} {share:.1%}"></i>')
    return f'<div class="bar" role="img" aria-label="goodput {account.goodput:.1%}">{"".join(pieces)}</div>'


def _table(table: Table, *, heads: bool = True) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        found = []
        for index, cell in enumerate(cells):
            of_text = ' class="t"' if index < table.num_text else ""
            found.append(f"<{'th' if index == 0 else tag}{of_text}>{escaped(cell)}</{'th' if index == 0 else tag}>")
        return f"<tr>{''.join(found)}</tr>"

    head = f"<thead>{row(table.headings, 'th')}</thead>" if heads else ""
    body = "".join(row(cells, "td") for cells in table.rows)
    notes = "".join(f'<p class="note">{escaped(note)}</p>' for note in table.notes)
    grid = f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>' if table.rows else ""
    return f"{grid}{notes}"


def _layers(records: LayerRecords) -> str:
    """A picture of the share of clipped units: parameters from top to bottom, steps from left to right."""
    shares = records.fraction
    rows, columns = (np.linspace(0, size - 1, min(size, _MAX_PICTURE_PX)).astype(int) for size in shares.shape)
    opacity = np.nan_to_num(shares[np.ix_(rows, columns)]).clip(0, 1)
    pixels = np.zeros((*opacity.shape, 4), np.uint8)
    pixels[..., :3] = (74, 127, 212)  # can be seen on light and on dark ground
    pixels[..., 3] = np.round(255 * opacity)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    about = (
        "Share of clipped units: parameters in the order of the network from top to bottom, steps from left to right"
    )
    return f'<img class="layers" alt="{about}" src="data:image/png;base64,{data}"><p class="note">{about}.</p>'
