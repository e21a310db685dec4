"""Reads a table of images and labels from a CSV file; every error names the file, the line and the remedy."""

import codecs
import csv
import io
from pathlib import Path
from typing import NamedTuple

from nfnet_flax.config import ConfigError

_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
"""Bytes at the beginning of a text -> its encoding."""
_OTHER_DELIMITERS = ";\t|"


class Columns(NamedTuple):
    """Names of the columns that are read, and how a file is divided into cells."""

    image: str
    """Column with the name of the image file."""
    label: str
    """Column with the class, or with several classes."""
    split: str | None
    """Column with the name of the split; None: there is none."""
    separator: str | None
    """Text between the classes of one image; None: each image has one class."""
    delimiter: str
    """Character between two cells."""
    encoding: str
    """Encoding of a file that does not begin with a byte order mark."""
    allow_none: bool
    """Whether an image may have no class; only with a separator."""


class Row(NamedTuple):
    """A row of the table, without the columns that are not read."""

    line: int
    """Number of the line in the file, counted from 1."""
    image: str
    """Name of the image file, as written."""
    labels: tuple[str, ...]
    """Names of the classes, each once, sorted."""
    split: str
    """Name of the split; empty without such a column."""


def read_table(path: Path, columns: Columns) -> list[Row]:
    """All rows of a file. Spaces around a cell and empty lines do not count.

    Raises:
      ConfigError: the file is missing, is not a table in this encoding, lacks a column, or a row lacks a cell, the name
        of its image, or its class.
    """
    text = io.StringIO(_text(path, columns.encoding), newline="")
    # `strict`: a quote that is not closed would otherwise make all lines after it one cell.
    reader = csv.reader(text, delimiter=columns.delimiter, strict=True)
    rows, places, line = [], None, 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if places is None:
                    header = [cell.strip() for cell in cells]
                    places = _places(path, header, columns)
                else:
                    rows.append(_row(path, line, cells, header, places, columns))
            line = reader.line_num + 1  # a cell in quotes may have several lines
    except csv.Error as error:
        raise ConfigError(f"{str(path)!r}, line {line}: {error}: correct the quotes or the cell") from error
    if places is None:
        raise ConfigError(f"{str(path)!r} is empty: its first line must name the columns, and each other line an image")
    if not rows:
        raise ConfigError(f"{str(path)!r} has no row after the names of its columns: add a line for each image")
    return rows


def _text(path: Path, encoding: str) -> str:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ConfigError(f"{str(path)!r} is no file: give the path of a CSV file") from error
    except PermissionError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error.strerror}): get the permission to read it") from error
    bom = next((bom for bom in _BOMS if content.startswith(bom)), b"")
    encoding, content = _BOMS.get(bom, encoding), content[len(bom) :]
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{str(path)!r}, line {line}: is not {encoding} ({error.reason}): save the file as UTF-8, or give its "
            "encoding, such as --data.source.encoding latin-1"
        ) from error


def _places(path: Path, header: list[str], columns: Columns) -> dict[str, int]:
    """Name of each column that is read -> its position."""
    named = {"image": columns.image, "label": columns.label, "split": columns.split}
    for field, name in named.items():
        if name is None:
            continue
        if (count := header.count(name)) > 1:
            raise ConfigError(f"{str(path)!r}, line 1: {count} columns are named {name!r}: rename all but one")
        if not count:
            other = next((mark for mark in _OTHER_DELIMITERS if len(header) == 1 and mark in header[0]), None)
            option = "split-column" if field == "split" else field
            remedy = f"name the column by --data.source.{option}"
            if other is not None:
                remedy = f"the columns seem to be divided by {other!r}: give --data.source.delimiter {other!r}"
            raise ConfigError(
                f"{str(path)!r}, line 1: there is no column {name!r}; there are {', '.join(map(repr, header))}: "
                f"{remedy}"
            )
    return {name: header.index(name) for name in named.values() if name is not None}


def _row(path: Path, line: int, cells: list[str], header: list[str], places: dict[str, int], columns: Columns) -> Row:
    where = f"{str(path)!r}, line {line}"
    if len(cells) != len(header):
        raise ConfigError(
            f"{where}: has {len(cells)} cells, and there are {len(header)} columns: put cells that contain "
            f"{columns.delimiter!r} into double quotes, and leave no cell out"
        )
    image, label = (cells[places[name]].strip() for name in (columns.image, columns.label))
    if not image:
        raise ConfigError(f"{where}: column {columns.image!r} is empty: name the image file, or remove the line")
    parts = [label] if columns.separator is None else label.split(columns.separator)
    labels = tuple(sorted({part.strip() for part in parts} - {""}))
    if not labels and not columns.allow_none:
        remedy = "give a class, or remove the line"
        if columns.separator is not None:
            remedy += "; if images may have none of the classes, give --data.source.allow-none"
        raise ConfigError(f"{where}: column {columns.label!r} is empty: {remedy}")
    return Row(line, image, labels, "" if columns.split is None else cells[places[columns.split]].strip())
