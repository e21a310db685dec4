"""What progress looks like on a terminal, drawn by `rich`, which knows what that can do (NO_COLOR, encoding)."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nfnet_flax import columns
from nfnet_flax.units import clock

if TYPE_CHECKING:
    from nfnet_flax.progress import Task

_GAP = 2
"""Number of columns between two texts."""
_BAR_WIDTHS = 6, 40
_MAX_TASKS = 5


def lines(tasks: Sequence["Task"], width: int, stream: Any) -> list[str]:
    """The lines of some tasks, each of at most `width` columns, with the control characters of colours.

    Args:
      tasks: the tasks, the oldest first; of more than five, the number of the others is given.
      width: number of columns.
      stream: the terminal.
    """
    console = Console(file=stream, force_terminal=True, force_jupyter=False, width=width, highlight=False)
    with console.capture() as captured:
        for task in tasks[:_MAX_TASKS]:
            console.print(_first_line(task, width), no_wrap=True, crop=True)
            for line in _flowing(task.facts, width):
                console.print(Text(line), no_wrap=True, crop=True)
        if (rest := len(tasks) - _MAX_TASKS) > 0:
            console.print(Text(columns.without_end(f"and {rest} more", width), style="dim"))
    return captured.get().splitlines()


def _first_line(task: "Task", width: int) -> RenderableType:
    """What is done, a bar, and numbers, as many as there is room for: the most important ones."""
    text = columns.one_line(task.text)
    room = width - min(columns.width_of(text), width // 2)
    numbers = []
    for number in _numbers(task):
        if len(number) + _GAP <= room:
            numbers.append(number)
            room -= len(number) + _GAP
    behind = (" " * _GAP).join(numbers)
    room = width - (len(behind) + _GAP if behind else 0)
    text = columns.without_end(text, room)
    room -= columns.width_of(text) + _GAP
    cells: list[RenderableType] = [Text(text, style="bold")]
    least, most = _BAR_WIDTHS
    if task.total and room >= least:
        cells.append(ProgressBar(task.total, min(task.done, task.total), min(room, most), complete_style="cyan"))
    cells.append(Text(behind))
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    for _ in cells:
        grid.add_column(no_wrap=True)
    grid.add_row(*cells)
    return grid


def _numbers(task: "Task") -> Iterator[str]:
    """Texts with numbers, the most important first."""
    if task.total:
        yield f"{min(1.0, task.done / task.total):4.0%}"
    left_s = task.left_s
    yield f"{clock(task.seconds)} so far" if left_s is None else f"{clock(left_s)} left"
    for text in (task.amount(), task.rate()):
        if text:
            yield text


def _flowing(texts: Sequence[str], width: int) -> Iterator[str]:
    """Texts in lines of a width, as many to a line as fit."""
    line = ""
    for text in (columns.without_end(columns.one_line(text), width) for text in texts):
        joined = f"{line}{' ' * _GAP}{text}" if line else text
        if columns.width_of(joined) > width:
            yield line
            joined = text
        line = joined
    if line:
        yield line
