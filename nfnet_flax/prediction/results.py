"""Results as a table, CSV or JSON lines: one image after the other, so that memory does not depend on their number."""

import abc
import contextlib
import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from nfnet_flax import columns
from nfnet_flax.config import ConfigError
from nfnet_flax.prediction.images import Unreadable
from nfnet_flax.prediction.predictor import Prediction
from nfnet_flax.units import as_float32

_TABLE_ROWS_AHEAD = 32
"""Number of images by which the widths of the columns are chosen."""
_TERMINAL_FILE_WIDTHS = 16, 40
"""Smallest and largest width of the column of files on a terminal."""
_TERMINAL_NAME_WIDTHS = 8, 24
_BESIDE_NAME = len("   100.00%")
"""Width of what a class takes beside its name."""


@dataclasses.dataclass
class Counts:
    """How many images there were."""

    good: int = 0
    """Images with a prediction."""
    failed: int = 0
    """Images without one."""


class Writer(abc.ABC):
    """A form of the results."""

    @abc.abstractmethod
    def write(self, result: Prediction | Unreadable) -> None:
        """Writes the result of one image."""

    def finish(self, counts: Counts) -> None:
        """Writes what follows the last image."""
        del counts


class TargetFile:
    """A text file that gets its name only when it is complete. Text without a form in UTF-8, such as file names of
    another encoding, is written as escapes."""

    def __init__(self, field: str, path: Path) -> None:
        self._field, self._path = field, path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with self._explained():
            self._file = self._partial.open("w", encoding="utf-8", errors="backslashreplace", newline="")

    def write(self, text: str) -> int:
        """Writes text.

        Raises:
          ConfigError: it cannot be written.
        """
        with self._explained():
            return self._file.write(text)

    def keep(self) -> None:
        """Gives the complete file its name; raises `ConfigError` if it cannot be written."""
        with self._explained():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)

    def drop(self) -> None:
        """Removes the file, unless it is complete."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self._field} = {str(self._path)!r}: cannot be written: {error.strerror}") from error


class Csv(Writer):
    """A row for each image: `file`, `class_1`, `probability_1`, ..., `error`."""

    def __init__(self, out: TextIO | TargetFile, top: int) -> None:
        self._rows = csv.writer(out, lineterminator="\n")
        self._top = top
        pairs = [f"{kind}_{rank}" for rank in range(1, top + 1) for kind in ("class", "probability")]
        self._rows.writerow(["file", *pairs, "error"])

    def write(self, result: Prediction | Unreadable) -> None:
        if isinstance(result, Unreadable):
            self._rows.writerow([result.source, *[""] * (2 * self._top), result.reason])
            return
        cells = [cell for name, value in result.top(self._top) for cell in (name, as_float32(value))]
        self._rows.writerow([result.source, *cells, ""])


class JsonLines(Writer):
    """A JSON object for each image, each in a line: `file`, and `top` (a list of `class` and `probability`) or
    `error`."""

    def __init__(self, out: TextIO | TargetFile, top: int) -> None:
        self._out, self._top = out, top

    def write(self, result: Prediction | Unreadable) -> None:
        row: dict[str, Any] = {"file": result.source}
        if isinstance(result, Unreadable):
            row["error"] = result.reason
        else:
            row["top"] = [{"class": name, "probability": as_float32(value)} for name, value in result.top(self._top)]
        self._out.write(json.dumps(row, allow_nan=False) + "\n")


class Table(Writer):
    """Aligned columns on stdout, and images without a prediction on stderr. On a terminal, long names are cut."""

    def __init__(self, out: TextIO, errors: TextIO, top: int, names: tuple[str, ...]) -> None:
        self._out, self._errors, self._top = out, errors, top
        self._waiting: list[Prediction] = []
        self._widths: tuple[int, int] | None = None
        self._longest_name = max(columns.width_of(columns.one_line(name)) for name in names)

    def write(self, result: Prediction | Unreadable) -> None:
        if isinstance(result, Unreadable):
            self._out.flush()
            self._errors.write(f"nfnet: {columns.one_line(result.source)}: {columns.one_line(result.reason)}\n")
        elif self._widths is not None:
            self._print(result, *self._widths)
        else:
            self._waiting.append(result)
            if len(self._waiting) == _TABLE_ROWS_AHEAD:
                self._print_waiting()

    def finish(self, counts: Counts) -> None:
        self._print_waiting()
        if counts.failed:
            self._out.flush()
            total = counts.good + counts.failed
            self._errors.write(f"nfnet: {counts.failed:,} of {total:,} images have no result\n")

    def _print_waiting(self) -> None:
        self._widths = self._widths or self._chosen_widths()
        for result in self._waiting:
            self._print(result, *self._widths)
        self._waiting.clear()

    def _chosen_widths(self) -> tuple[int, int]:
        """Widths of the columns of files and of names."""
        file_width = max((columns.width_of(columns.one_line(result.source)) for result in self._waiting), default=0)
        if not self._out.isatty():
            return file_width, self._longest_name
        file_width = min(file_width, _TERMINAL_FILE_WIDTHS[1])
        available = shutil.get_terminal_size().columns
        room = (available - file_width) // self._top - _BESIDE_NAME
        least, most = _TERMINAL_NAME_WIDTHS
        name_width = min(self._longest_name, max(least, min(most, room)))
        room = available - self._top * (name_width + _BESIDE_NAME)
        return min(file_width, max(_TERMINAL_FILE_WIDTHS[0], room)), name_width

    def _print(self, result: Prediction, file_width: int, name_width: int) -> None:
        source, is_cut = columns.one_line(result.source), self._out.isatty()
        if is_cut:
            source = columns.without_start(source, file_width)
        cells = []
        for name, value in result.top(self._top):
            text = columns.without_end(columns.one_line(name), name_width) if is_cut else columns.one_line(name)
            cells.append(f"{columns.left(text, name_width)} {value:>7.2%}")
        self._out.write("  ".join([columns.left(source, file_width), *cells]).rstrip() + "\n")
