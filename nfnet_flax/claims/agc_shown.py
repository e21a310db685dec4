"""Tables and a picture of what `agc.py` measured, made from its evidence alone."""

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nfnet_flax.claims.agc import PUBLISHED_EXEMPT, SKIP_GAINS
from nfnet_flax.claims.evidence import Evidence, markdown_table, origin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEAR = 0.01
"""A setting is as good as the best one if its top-1 is lower by at most this."""
_NOTE = (
    "Top-1 on held-out digits: mean and standard deviation over the seeds; a run that diverged, that is, whose loss or "
    "gradient was not finite, counts as 0. Factor: of the largest setting within one point of the best one to the "
    "smallest, so a large factor means that the setting hardly matters."
)
_COLOURS = {
    ("BatchNorm", ""): "#555555",
    ("no clipping", ""): "#cc79a7",
    ("AGC", PUBLISHED_EXEMPT): "#0072b2",
    ("AGC", SKIP_GAINS): "#56b4e9",
    ("global norm", ""): "#d55e00",
}
_LABELS = {
    ("BatchNorm", ""): "BatchNorm, no clipping",
    ("no clipping", ""): "normalizer-free, no clipping",
    ("AGC", PUBLISHED_EXEMPT): "normalizer-free, AGC",
    ("AGC", SKIP_GAINS): "normalizer-free, AGC, skip gains exempt",
    ("global norm", ""): "normalizer-free, norm of the whole gradient",
}


class Spread(NamedTuple):
    """Top-1 of a setting over its seeds. A run that diverged counts as 0."""

    mean: float
    std: float
    """Standard deviation of a sample; 0 for one seed."""
    num_diverged: int
    num_runs: int

    def text(self) -> str:
        """For a table, in percent."""
        if self.num_diverged == self.num_runs:
            return f"diverged ({self.num_runs} of {self.num_runs})"
        about = f", {self.num_diverged} of {self.num_runs} diverged" if self.num_diverged else ""
        deviation = f" ± {100 * self.std:.1f}" if self.num_runs > 1 else ""
        return f"{100 * self.mean:.1f}{deviation}{about}"


def spread(cells: Sequence[dict[str, Any]]) -> Spread:
    """The spread of the top-1 accuracies of the runs of one setting."""
    values = [cell["top1"] if cell["outcome"] == "finished" else 0.0 for cell in cells]
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), std, sum(cell["outcome"] == "diverged" for cell in cells), len(values))


def tables(found: Evidence) -> dict[str, str]:
    """Name of each table -> its text in Markdown."""
    data = found.data
    study = data["study"]
    sizes = study["batch_sizes"]
    num_seeds = f"{study['seeds']} seed{'' if study['seeds'] == 1 else 's'}"
    rows = []
    for kind, exempt in _LABELS:
        for value in _values(study, kind):
            label = _LABELS[kind, exempt] + ("" if value is None else f" {value:g}")
            spreads = [spread(_chosen(data, kind, exempt, value, size)) for size in sizes]
            rows.append([label, *(each.text() for each in spreads)])
    columns = [f"top-1 in %, {num_seeds}", *(f"batch {size}" for size in sizes)]
    size, ratio = study["exempt_batch_size"], study["exempt_ratio"]
    exempt_rows = [[each, spread(_chosen(data, "AGC", each, ratio, size)).text()] for each in _exemptions(data)]
    about = f"not clipped (AGC {ratio:g}, batch {size})"
    near = [
        "batch",
        "clipping",
        "best at",
        "top-1, %",
        "worst at",
        "top-1, %",
        "within one point of the best",
        "factor",
    ]
    return {
        "settings": markdown_table(columns, rows),
        "sensitivity": markdown_table(near, list(_sensitivities(data))),
        "exempt": markdown_table([about, f"top-1 in %, {num_seeds}"], exempt_rows),
    }


def agc_text(found: Evidence) -> str:
    """All tables, and what they mean."""
    return "\n\n".join([origin(found), _NOTE, *tables(found).values()])


def _values(study: dict[str, Any], kind: str) -> Sequence[float | None]:
    return {"AGC": study["ratios"], "global norm": study["max_norms"]}.get(kind, [None])


def _chosen(data: dict[str, Any], kind: str, exempt: str, value: float | None, size: int) -> list[dict[str, Any]]:
    wanted = (kind, exempt, value, size)
    keys = ("kind", "exempt", "value", "batch_size")
    return [cell for cell in data["cells"] if tuple(cell[key] for key in keys) == wanted]


def _exemptions(data: dict[str, Any]) -> list[str]:
    found = dict.fromkeys(cell["exempt"] for cell in data["cells"] if cell["kind"] == "AGC")
    return [exempt for exempt in found if exempt != SKIP_GAINS]


def _sensitivities(data: dict[str, Any]) -> Iterator[list[str]]:
    """For each batch size and way of clipping: the best setting, and which others are as good."""
    study = data["study"]
    for size in study["batch_sizes"]:
        for kind, exempt in _LABELS:
            values = [value for value in _values(study, kind) if value is not None]
            if not values:
                continue
            means = {value: spread(_chosen(data, kind, exempt, value, size)).mean for value in values}
            best, worst = (choose(means, key=lambda value: means[value]) for choose in (max, min))
            near = [value for value in values if means[value] >= means[best] - _NEAR]
            label = _LABELS[kind, exempt].removeprefix("normalizer-free, ")
            ends = [text for value in (best, worst) for text in (f"{value:g}", f"{100 * means[value]:.1f}")]
            yield [str(size), label, *ends, ", ".join(f"{value:g}" for value in near), f"{max(near) / min(near):g}"]


def agc_picture(found: Evidence, width: float, height: float) -> "Figure":
    """Accuracy over the batch size, for the best setting of each way of clipping, and over the setting for each batch
    size. Width and height in inches."""
    from matplotlib.figure import Figure

    data = found.data
    study = data["study"]
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(origin(found), fontsize=8, parse_math=False)
    left, *others = figure.subplots(1, 1 + len(study["batch_sizes"]), sharey=True)
    sizes = study["batch_sizes"]
    for kind, exempt in _LABELS:
        best = [
            max(
                (spread(_chosen(data, kind, exempt, value, size)) for value in _values(study, kind)),
                key=lambda each: each.mean,
            )
            for size in sizes
        ]
        _draw_line(left, sizes, best, kind, exempt)
    left.set_xlabel("batch size (best setting of each)")
    left.set_ylabel("top-1 in %")
    for axes, size in zip(others, sizes, strict=True):
        for kind, exempt in _LABELS:
            values = [value for value in _values(study, kind) if value is not None]
            spreads = [spread(_chosen(data, kind, exempt, value, size)) for value in values]
            _draw_line(axes, values, spreads, kind, exempt)
        axes.set_xlabel(f"lambda or threshold, batch {size}")
    for axes in (left, *others):
        axes.set_xscale("log")
        axes.set_ylim(-3, 103)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _draw_line(axes: "Axes", places: Sequence[float], spreads: Sequence[Spread], kind: str, exempt: str) -> None:
    axes.errorbar(
        places,
        [100 * each.mean for each in spreads],
        yerr=[100 * each.std for each in spreads],
        label=_LABELS[kind, exempt],
        color=_COLOURS[kind, exempt],
        marker="o",
        markersize=3.5,
        linewidth=1.4,
        capsize=2,
    )
