"""The tables of an evaluation."""

from collections.abc import Sequence

from nfnet_flax import columns
from nfnet_flax.units import metric_text

_FIRST = ("top1", "top5", "loss")
"""Metrics that are printed before all others, if the evaluation has them."""
_COUNT = "num_"
"""Beginning of the names of metrics that are numbers of images, and no columns of a table."""


def print_accuracy(metrics: dict[str, float]) -> None:
    """Prints the metrics of a run's evaluation as a table, for raw and EMA parameters."""
    labels = {"eval": "raw", "eval_ema": "EMA"}
    rows = [
        ((label,), {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{prefix}/")})
        for prefix, label in labels.items()
    ]
    print_rows(("parameters",), rows)


def print_rows(headings: Sequence[str], rows: Sequence[tuple[Sequence[str], dict[str, float]]]) -> None:
    """Prints a table of metrics, and on how many images they were measured.

    Args:
      headings: headings of the first columns.
      rows: the cells of the first columns, and the metrics by name; all rows have the metrics of the last one.
    """
    found = [name for name in rows[-1][1] if not name.startswith(_COUNT)]
    names = [*(name for name in _FIRST if name in found), *(name for name in found if name not in _FIRST)]
    table = [[*headings, *(metric_text(name, 0.0)[0] for name in names)]]
    table += [[*first, *(metric_text(name, metrics[name])[1] for name in names)] for first, metrics in rows]
    widths = [max(map(columns.width_of, column)) for column in zip(*table, strict=True)]
    note = f"   on {rows[0][1]['num_examples']:.0f} examples"
    num_first = len(headings)
    for cells in table:
        padded = [
            columns.left(cell, max(width, 11)) if index < num_first else columns.right(cell, max(width, 8))
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print(f"{' '.join(padded)}{note}")
        note = ""
