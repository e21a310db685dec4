"""Figures of the documentation: what the tools named bench_* write with `--json`, and the pages' tables are made of.

A file has `rows`, one object for each row of the table: heading -> number or text. Beside them stand, as far as they
are known, the `command`, `machine`, `date` and `versions`. `{NAME|ROW|HEADING}` in a text is a cell of the file
`NAME.json`: that of the row whose first cell is ROW.
"""

import datetime
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
MARKED = re.compile(r"^<!-- figures: (?P<name>[\w-]+) -->\n(?P<table>(?:\|[^\n]*\n)*)", re.MULTILINE)
_KNOWN = {"command", "machine", "date", "versions", "rows"}
_NEEDED = {"rows"}
_CELL = re.compile(r"\{([\w-]+)\|([^|{}]+)\|([^|{}]+)\}")

Row = Mapping[str, float | str]


def write_figures(path: Path, rows: Sequence[Row], argv: Sequence[str] | None = None) -> None:
    """Writes what a tool measured just now on this machine. `argv`: its command line, `sys.argv` by default."""
    from nfnet_flax.claims.evidence import evidence

    made = evidence("", _command(list(sys.argv if argv is None else argv)), {})
    found = {"command": made.command, "machine": made.machine, "date": made.date, "versions": made.versions}
    path.write_text(json.dumps({**found, "rows": [dict(row) for row in rows]}, indent=1, ensure_ascii=False) + "\n")


def _command(argv: list[str]) -> str:
    """The command line without the option that names the file, and without the folder of this checkout."""
    at = next((index for index, word in enumerate(argv) if word == "--json"), None)
    words = argv if at is None else argv[:at] + argv[at + 2 :]
    words = [word for word in words if not word.startswith("--json=")]
    return shlex.join(["python", f"tools/{Path(words[0]).name}", *words[1:]])


def read_figures(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Reads `docs/figures/NAME.json`.

    Raises:
      ValueError: it has no rows, other fields, a date that is none, or rows with different headings.
    """
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    if not _NEEDED <= set(found) <= _KNOWN:
        raise ValueError(f"{name}.json has the fields {sorted(found)}; known are {sorted(_KNOWN)}")
    if "date" in found:
        datetime.date.fromisoformat(found["date"])
    if len({tuple(row) for row in found["rows"]}) != 1:
        raise ValueError(f"{name}.json: all rows must have the same headings, in the same order")
    return found


def table(name: str, folder: Path = FOLDER) -> str:
    """The table of a file in Markdown, with the end of its last line.

    Raises:
      ValueError: as for `read_figures`, or a text names a cell that is not there.
    """
    rows = read_figures(name, folder)["rows"]
    texts = [[_CELL.sub(lambda found: _cell(found, folder), str(cell)) for cell in row.values()] for row in rows]
    heading, *lines = (
        "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n" for cells in (list(rows[0]), *texts)
    )
    return "".join([heading, "|" + "---|" * len(rows[0]) + "\n", *lines])


def _cell(named: re.Match[str], folder: Path) -> str:
    name, first, heading = named.groups()
    for row in read_figures(name, folder)["rows"]:
        if next(iter(row.values())) == first and heading in row:
            return str(row[heading])
    raise ValueError(f"{named[0]}: {name}.json has no such row or heading")


def filled(text: str, folder: Path = FOLDER) -> str:
    """A page whose tables below `<!-- figures: NAME -->` are those of the files."""
    return MARKED.sub(lambda found: f"<!-- figures: {found['name']} -->\n{table(found['name'], folder)}", text)
