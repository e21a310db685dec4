"""The table of an evaluation."""

from nfnet_flax.units import metric_text

_FIRST = ("top1", "top5", "loss")
"""Metrics that are printed before all others, if the evaluation has them."""


def print_accuracy(metrics: dict[str, float]) -> None:
    """Prints the metrics of an evaluation as a table, for raw and EMA parameters."""
    found = [name.removeprefix("eval_ema/") for name in metrics if name.startswith("eval_ema/")]
    names = [*(name for name in _FIRST if name in found), *(name for name in found if name not in _FIRST)]
    rows = [["parameters", *(metric_text(name, 0.0)[0] for name in names)]]
    for label, prefix in (("raw", "eval"), ("EMA", "eval_ema")):
        rows.append([label, *(metric_text(name, metrics[f"{prefix}/{name}"])[1] for name in names)])
    widths = [max(8, len(heading)) for heading in rows[0][1:]]
    for (label, *cells), note in zip(rows, (f"   on {metrics['eval/num_examples']:.0f} examples", "", ""), strict=True):
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{label:<12}{' '.join(aligned)}{note}")
