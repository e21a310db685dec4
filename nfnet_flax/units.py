"""Numbers, lists and names as text for people: numbers with a few digits and a unit that fits, long lists cut short."""

from collections.abc import Sequence

import numpy as np

_MAX_NAMES_SHOWN = 5


def human_size(num_bytes: float) -> str:
    """A number of bytes as text, such as `1.5 GiB`."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def scaled(number: float) -> str:
    """A number as text with three digits and the prefix of a unit, such as `31.0 M`."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            digits = number / 10**power
            return f"{digits:.{0 if digits >= 100 else 1 if digits >= 10 else 2}f} {prefix}"
    return f"{number:.0f} "


def duration(seconds: float) -> str:
    """A duration as text: in milliseconds, or in microseconds if it is shorter than one millisecond."""
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def long_duration(seconds: float) -> str:
    """A duration of any length as text in two units, such as `1 h 02 min`, or in seconds if it is short."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for length, unit, smaller, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // smaller:02d} {part}"
    return f"{whole} s"


def clock(seconds: float) -> str:
    """A duration as text, to the second, such as `0:04` or `1:02:33` (hours, minutes and seconds)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def as_float32(value: float) -> float:
    """A number rounded to float32. Its text, also in CSV and JSON, has the fewest digits that give this float32."""
    return float(str(np.float32(value)))


def shown(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are, as text."""
    rest = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def printable(text: str) -> str:
    """A text on one line that every encoding of Unicode can represent: other characters are shown as `?`."""
    return "".join(char if char.isprintable() else "?" for char in text)


_RATES = {"top1": "top-1", "top5": "top-5"}
"""Metrics that are shown as percentages, with their headings."""
_HEADINGS = {"ece": "ECE"}
"""Headings of other metrics, if they are not their names."""


def metric_text(name: str, value: float) -> tuple[str, str]:
    """Heading and value of a metric of an evaluation, such as `top-1` and `98.06%`."""
    return (_RATES[name], f"{value:.2%}") if name in _RATES else (_HEADINGS.get(name, name), f"{value:.4f}")
