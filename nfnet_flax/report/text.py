"""A report as text."""

from collections.abc import Iterator, Sequence

from nfnet_flax import columns
from nfnet_flax.report import tables
from nfnet_flax.report.facts import RunFacts
from nfnet_flax.report.recipe_changes import Fields
from nfnet_flax.report.tables import PART_TEXTS, Table
from nfnet_flax.telemetry.goodput import Account, Part

_BAR_WIDTH = 72
_MAX_CELL, _MAX_LAST_CELL = 60, 400
"""Longer texts in a cell are cut; in the last column there is more room."""
_LETTERS: dict[Part, str] = {
    "productive": "=",
    "repeated": "R",
    "start": "S",
    "restore": "r",
    "compile": "C",
    "input": "I",
    "save": "s",
    "evaluation": "E",
    "end": "e",
    "unrecorded": "?",
    "not_running": ".",
}
"""Part of the wall time -> its character in the bar."""


def report_text(runs: Sequence[RunFacts], base: tuple[str, Fields] | None) -> str:
    """The whole report; arguments as for `page.report_page`."""
    return "\n".join(_lines(runs, base)) + "\n"


def _lines(runs: Sequence[RunFacts], base: tuple[str, Fields] | None) -> Iterator[str]:
    yield from _table(tables.summary(runs), heading=len(runs) > 1)
    bars = [(run, _bar(run.account)) for run in runs if run.account is not None]
    for run, bar in bars:
        yield ""
        yield f"[{bar}] goodput {run.account.goodput if run.account else 0:.1%}" + (
            f"  {columns.one_line(run.label)}" if len(runs) > 1 else ""
        )
    if bars:
        used = [part for part in PART_TEXTS if any(_LETTERS[part] in bar for _, bar in bars)]
        yield "  ".join(f"{_LETTERS[part]} {PART_TEXTS[part]}" for part in used)
        yield ""
        yield from _table(tables.breakdown(runs))
    compared = tables.recipes_compared(runs)
    if compared is not None:
        yield ""
        yield from _table(compared)
    for run in runs:
        if len(runs) > 1:
            yield ""
            yield f"=== {columns.one_line(run.label)}"
        for topic, table in tables.tables_of(run, base):
            note = run.note(topic)
            if table is None and note is None:
                continue
            yield ""
            yield from [] if table is None else _table(table)
            yield from [] if note is None else [f"{topic}: {columns.one_line(note)}"]


def _bar(account: Account) -> str:
    """One character for each equal part of the wall time, in the order of `PART_TEXTS`."""
    bar, until_s = "", 0.0
    for part in PART_TEXTS:
        until_s += account.seconds[part]
        bar += _LETTERS[part] * (round(_BAR_WIDTH * until_s / max(account.wall_s, 1e-9)) - len(bar))
    return bar


def _table(table: Table, *, heading: bool = True) -> Iterator[str]:
    rows = [_cells(row) for row in table.rows]
    if heading:
        yield table.title
        rows.insert(0, _cells(table.headings))
    if table.rows:
        widths = [max(map(columns.width_of, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            padded = [
                columns.left(cell, width) if index < table.num_text else columns.right(cell, width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            yield ("  " + "  ".join(padded)).rstrip()
    for note in table.notes:
        yield f"  {columns.one_line(note)}"


def _cells(row: Sequence[str]) -> list[str]:
    rooms = [*[_MAX_CELL] * (len(row) - 1), _MAX_LAST_CELL]
    return [columns.without_end(columns.one_line(text), room) for text, room in zip(row, rooms, strict=True)]
