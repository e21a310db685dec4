"""Where TensorBoard shows the metrics of a run.

TensorBoard draws curves on one card if they have the same tag in different runs, and sorts cards by their tags. So the
most important metrics are written a second time, into folders within that of the run: `train`, `held_out` (raw
parameters) and `held_out_ema`. Their tags come first on the page: one card for the loss in training, with the raw and
with the EMA parameters, and so on.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nfnet_flax.units import metric_text

MAIN_RUN = ""
"""The folder of the run itself, which holds every metric under its own name."""
_NOT_SHOWN = frozenset({"eval/num_examples"})
"""Metrics that are the same at every step: they are only in `metrics.jsonl`."""
_CARDS = {
    "train/loss": ("train", "1 loss"),
    "eval/loss": ("held_out", "1 loss"),
    "eval_ema/loss": ("held_out_ema", "1 loss"),
    "train/top1": ("train", "2 top-1 accuracy"),
    "eval/top1": ("held_out", "2 top-1 accuracy"),
    "eval_ema/top1": ("held_out_ema", "2 top-1 accuracy"),
    "eval/mean_average_precision": ("held_out", "2 mean average precision"),
    "eval_ema/mean_average_precision": ("held_out_ema", "2 mean average precision"),
    "train/learning_rate": ("train", "3 learning rate"),
    "throughput/images_per_s": ("train", "4 images per s"),
}
"""Name of a metric -> the run and the card that show it a second time."""
_PLACES = {name: (run, f"Overview/{card}") for name, (run, card) in _CARDS.items()}
"""The same with the tag. Capital letters are sorted before the small ones of the metrics' own names."""
_NAMES = {place: name for name, place in _PLACES.items()}
COMPARED_RUNS = {"held_out": "raw", "held_out_ema": "EMA"}
"""Runs that the tab `HParams` compares -> whose parameters they are about. (For the folder that TensorBoard is started
on, which is often that of the run itself, it finds no metrics.)"""
RUNS = (MAIN_RUN, *dict.fromkeys(run for run, _ in _PLACES.values()))
"""Folders of event files, within that of the run."""


def places_of(name: str) -> Iterator[tuple[str, str]]:
    """The run and the tag of each place where TensorBoard shows a metric."""
    if name not in _NOT_SHOWN:
        yield MAIN_RUN, name
    if name in _PLACES:
        yield _PLACES[name]


def metric_of(run: str, tag: str) -> str:
    """The name of the metric that has a tag in a run; in the run itself, and for other tags, the tag."""
    return _NAMES.get((run, tag), tag)


def by_run(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Run -> tag -> value, for the metrics of a step."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        for run, tag in places_of(name):
            found.setdefault(run, {})[tag] = value
    return found


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of the tab `Custom Scalars`, with a curve for each tag."""

    title: str
    tags: tuple[str, ...]
    """Regular expressions of tags."""


def layout(metric_names: tuple[str, ...], *, clips_units: bool) -> dict[str, tuple[Chart, ...]]:
    """The charts of the tab `Custom Scalars`, by the title of their category.

    Args:
      metric_names: names of the objective's metrics, such as `loss`.
      clips_units: whether the optimizer clips by AGC.
    """
    return {
        "Results": (
            *(_chart_of(name) for name in metric_names),
            Chart("learning rate", ("train/learning_rate$",)),
            Chart("images per s", ("throughput/images_per_s$",)),
        ),
        "Update": (
            *(_AGC_CHARTS if clips_units else ()),
            Chart("norm of the gradient", ("train/grad_norm$",)),
            Chart("norm of the parameters", ("train/param_norm$",)),
            Chart("norm of the update", ("train/update_norm$",)),
        ),
        "Time": (Chart("seconds since the last log step", ("time/.+_s$",)),),
    }


_AGC_CHARTS = (
    Chart("AGC: share of units whose gradient is scaled down", ("agc/clipped_fraction$",)),
    Chart("AGC: gradient norm / parameter norm of a unit, median", ("agc/median_ratio$",)),
    Chart("AGC: the same, largest", ("agc/largest_ratio$",)),
)


def _chart_of(name: str) -> Chart:
    """A metric of the objective in training, and on the held-out images with the raw and with the EMA parameters."""
    heading, _ = metric_text(name, 0.0)
    return Chart(heading, tuple(f"{prefix}/{re.escape(name)}$" for prefix in ("train", "eval", "eval_ema")))


def layout_proto(charts: Mapping[str, tuple[Chart, ...]]) -> Any:
    """The summary by which TensorBoard learns of a layout."""
    from tensorboard.plugins.custom_scalar import layout_pb2, summary

    return summary.pb(
        layout_pb2.Layout(
            category=[
                layout_pb2.Category(
                    title=title,
                    chart=[
                        layout_pb2.Chart(title=chart.title, multiline={"tag": list(chart.tags)})
                        for chart in of_category
                    ],
                )
                for title, of_category in charts.items()
            ]
        )
    )
