"""Text and picture of the runs that differ in the cut of the batch; both are made from the evidence alone."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from nfnet_flax.claims.cuts import BATCH_SIZE, NETWORKS
from nfnet_flax.claims.cuts_measured import Measured, RunRow, from_data, is_cut
from nfnet_flax.claims.evidence import Evidence, markdown_table, origin
from nfnet_flax.plots import Kind, picture_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"nf_resnet": "#0072b2", "resnet": "#d55e00"}
_NONE = "-"
Value = Callable[[RunRow], float | None]


def tables(found: Evidence) -> dict[str, str]:
    """Name of each table -> its text in Markdown.

    Raises:
      ConfigError: the evidence has another form.
    """
    measured = from_data(found.data)
    return {"cuts": _cuts_table(measured), "spread": _spread_table(measured), "devices": _devices_table(measured)}


def text(found: Evidence) -> str:
    """Tables in Markdown and what follows from them.

    Raises:
      ConfigError: the evidence has another form.
    """
    measured, made = from_data(found.data), tables(found)
    study = measured.study
    parts = [
        origin(found),
        f"Each run: {study.steps} updates of {BATCH_SIZE} images of {study.image_size} px. Given are the mean over "
        f"{_count(len(study.seeds), 'seed')}, and in brackets the lowest and the highest value.",
        made["cuts"],
        "How far the cuts are apart, for the same seed:",
        made["spread"],
        *(_about_cuts(measured, network) for network in NETWORKS),
        f"The same cut, in parts of {_count(study.images_per_part_on_devices, 'image')}, divided over devices "
        f"(seed {study.seeds[0]}):",
        made["devices"],
        *(_about_devices(measured, network) for network in NETWORKS),
    ]
    return "\n\n".join(parts)


def picture(found: Evidence, kind: Kind) -> bytes:
    """The content of a picture file: held-out accuracy and loss, and how far parameters are apart.

    Raises:
      ConfigError: the evidence has another form.
    """
    from matplotlib.figure import Figure

    measured = from_data(found.data)
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for network, name in NETWORKS.items():
        _draw_by_cut(panels[0], measured, network, name, lambda row: None if row.top1 is None else 100 * row.top1)
        _draw_by_cut(panels[1], measured, network, name, lambda row: row.loss)
        _draw_differences(panels[2], measured, network, name)
    labels = ("held-out top-1 (%)", "held-out loss", "largest difference of a parameter\nbetween the cuts")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:2]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(measured.study.images_per_part), map(str, sorted(measured.study.images_per_part)))
        axes.set_xlabel(f"images in each part of a batch of {BATCH_SIZE}")
    panels[2].set_xlabel("updates")
    panels[2].set_xscale("log")
    panels[2].set_yscale("log")
    panels[0].legend(frameon=False)
    figure.suptitle(origin(found), fontsize=8, parse_math=False)
    return picture_file(figure, kind)


def _cuts(measured: Measured, network: str, images_per_part: int | None = None) -> list[RunRow]:
    """The runs of a network that differ in cut and seed, of one cut or of all."""
    return [
        row
        for row in measured.runs
        if row.network == network and is_cut(row, measured.study) and images_per_part in (None, row.images_per_part)
    ]


def _values(rows: Iterable[RunRow], value: Value) -> list[float]:
    return [found for row in rows if (found := value(row)) is not None]


def _gap(row: RunRow) -> float | None:
    if row.training_mode_loss is None or row.evaluation_mode_loss is None:
        return None
    return row.evaluation_mode_loss - row.training_mode_loss


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _summary(values: Sequence[float], form: Callable[[float], str]) -> str:
    if not values:
        return _NONE
    return f"{form(statistics.mean(values))} ({form(min(values))} to {form(max(values))})"


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _cuts_table(measured: Measured) -> str:
    columns = [
        *("network", "images per part", "held-out top-1, %", "held-out loss"),
        *("training images, training mode: loss", "evaluation mode: loss", "gap", "diverged"),
    ]
    table = []
    for network, images in itertools.product(NETWORKS, measured.study.images_per_part):
        rows = _cuts(measured, network, images)
        table.append(
            [
                NETWORKS[network],
                str(images),
                _summary(_values(rows, lambda row: row.top1), _share),
                _summary(_values(rows, lambda row: row.loss), _loss),
                _summary(_values(rows, lambda row: row.training_mode_loss), _loss),
                _summary(_values(rows, lambda row: row.evaluation_mode_loss), _loss),
                _summary(_values(rows, _gap), _loss),
                f"{sum(row.outcome == 'diverged' for row in rows)} of {len(rows)}",
            ]
        )
    return markdown_table(columns, table)


def _spread_table(measured: Measured) -> str:
    steps = measured.study.compared_steps
    columns = [
        *("network", "seed", f"parameters after {_count(steps[0], 'update')}", f"after {_count(steps[-1], 'update')}"),
        *("held-out loss", "held-out top-1, points", "cuts with the same bits"),
    ]
    of_step = {(each.network, each.seed, each.step): each.parameters for each in measured.differences}
    table = []
    for network, seed in itertools.product(NETWORKS, measured.study.seeds):
        rows = [row for row in _cuts(measured, network) if row.seed == seed]
        losses, top1 = _values(rows, lambda row: row.loss), _values(rows, lambda row: row.top1)
        differences = [of_step.get((network, seed, step)) for step in (steps[0], steps[-1])]
        table.append(
            [
                NETWORKS[network],
                str(seed),
                *(_NONE if value is None else _small(value) for value in differences),
                _small(_range(losses)) if losses else _NONE,
                _share(_range(top1)) if top1 else _NONE,
                _same_bits(rows),
            ]
        )
    return markdown_table(columns, table)


def _same_bits(rows: Sequence[RunRow]) -> str:
    """Which cuts end with the same parameters and statistics, bit for bit."""
    by_bits: dict[str, list[int]] = {}
    for row in rows:
        if row.bits is not None:
            by_bits.setdefault(row.bits, []).append(row.images_per_part)
    groups = [" = ".join(map(str, images)) for images in by_bits.values() if len(images) > 1]
    return ", ".join(groups) or "none"


def _about_cuts(measured: Measured, network: str) -> str:
    name, study = NETWORKS[network], measured.study
    most, least = max(study.images_per_part), min(study.images_per_part)
    said = []
    accuracies = [_values(_cuts(measured, network, images), lambda row: row.top1) for images in (most, least)]
    losses = [_values(_cuts(measured, network, images), lambda row: row.loss) for images in (most, least)]
    if all(losses):
        top1, loss = [statistics.mean(each) for each in accuracies], [statistics.mean(each) for each in losses]
        said.append(
            f"{name}: from {most} to {_count(least, 'image')} in a part the mean top-1 goes from {_share(top1[0])}% to "
            f"{_share(top1[1])}%, and the held-out loss from {_loss(loss[0])} to {_loss(loss[1])}."
        )
    else:
        said.append(f"{name}: with {most} or {_count(least, 'image')} in a part, all runs diverged.")
    over_cuts = [
        _range(found)
        for seed in study.seeds
        if (found := _values((row for row in _cuts(measured, network) if row.seed == seed), lambda row: row.loss))
    ]
    over_seeds = [
        _range(found)
        for images in study.images_per_part
        if (found := _values(_cuts(measured, network, images), lambda row: row.loss))
    ]
    if over_cuts and over_seeds and len(study.seeds) > 1:
        said.append(
            f"The cut changes this loss by at most {_small(max(over_cuts))} for the same seed, and the seed by at most "
            f"{_small(max(over_seeds))} for the same cut."
        )
    gaps = [abs(gap) for gap in _values(_cuts(measured, network), _gap)]
    if gaps:
        said.append(f"The largest gap between the modes of any run is {_small(max(gaps))}.")
    return " ".join(said)


def _on_devices(measured: Measured, network: str) -> list[RunRow]:
    study = measured.study
    rows = [
        row
        for row in measured.runs
        if row.network == network
        and row.seed == study.seeds[0]
        and row.images_per_part == study.images_per_part_on_devices
    ]
    return [next(row for row in rows if row.num_devices == count) for count in study.devices]


def _devices_table(measured: Measured) -> str:
    columns = ["network", "devices", "images on each", "held-out loss", "parameters and statistics (SHA-256)"]
    table = [
        [
            NETWORKS[network],
            str(row.num_devices),
            str(BATCH_SIZE // row.num_devices),
            _NONE if row.loss is None else f"{row.loss:.9f}",
            _NONE if row.bits is None else f"`{row.bits[:16]}`",
        ]
        for network in NETWORKS
        for row in _on_devices(measured, network)
    ]
    return markdown_table(columns, table)


def _about_devices(measured: Measured, network: str) -> str:
    rows = _on_devices(measured, network)
    numbers = ", ".join(str(row.num_devices) for row in rows)
    if any(row.outcome == "diverged" for row in rows):
        return f"{NETWORKS[network]}: a run diverged."
    different = len({row.bits for row in rows})
    bits = "the same bits" if different == 1 else f"{different} different results"
    apart = _range([row.loss for row in rows if row.loss is not None])
    return (
        f"{NETWORKS[network]}: {numbers} devices end with {bits} of all parameters and statistics; the held-out loss "
        f"differs by {_small(apart)}."
    )


def _draw_by_cut(axes: "Axes", measured: Measured, network: str, name: str, value: Value) -> None:
    """A line through the means over the seeds, and a band from the lowest to the highest value."""
    found = [(images, _values(_cuts(measured, network, images), value)) for images in measured.study.images_per_part]
    found = sorted((images, values) for images, values in found if values)
    at = [images for images, _ in found]
    colour = _COLOURS[network]
    axes.plot(at, [statistics.mean(values) for _, values in found], color=colour, marker="o", markersize=4, label=name)
    lowest, highest = ([pick(values) for _, values in found] for pick in (min, max))
    axes.fill_between(at, lowest, highest, color=colour, alpha=0.2, linewidth=0)


def _draw_differences(axes: "Axes", measured: Measured, network: str, name: str) -> None:
    """A line for each seed."""
    for seed in measured.study.seeds:
        found = [each for each in measured.differences if each.network == network and each.seed == seed]
        shown = [(each.step, each.parameters) for each in found if each.parameters > 0]  # the axis is logarithmic
        label = name if seed == measured.study.seeds[0] else None
        axes.plot(*zip(*shown, strict=True) if shown else ((), ()), color=_COLOURS[network], linewidth=1.1, label=label)
