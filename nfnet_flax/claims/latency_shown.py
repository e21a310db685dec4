"""Tables and a picture of what `latency.py` and `latency_pair.py` found, made from their evidence alone."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nfnet_flax.claims import published
from nfnet_flax.claims.evidence import Evidence, markdown_table, origin
from nfnet_flax.claims.latency import EFFICIENTNETS, NFNETS, REFERENCE, Step, steps_of
from nfnet_flax.models.registry import PUBLISHED_TOP1_PERCENT
from nfnet_flax.units import duration, human_size, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAR = 0.2
"""A ratio that differs from the published one by more than this is explained by the most expensive operations."""
_NUM_OPERATIONS = 3
"""Number of operations that explain it."""
_LETTERS_PER_INCH = 16
"""How many letters of the heading fit into an inch of the picture's width."""
_ESTIMATED = (
    "Cycles are the TPU compiler's estimates of a step; nothing was measured. Where the package does not know the "
    "clock of a chip, there are no seconds."
)
_MEASURED = (
    "Each network was timed in turns with EfficientNet-B7 in one process. Times are medians; the ratio is the median "
    "of the rounds."
)
_NOTE = (
    "A ratio is the time of EfficientNet-B7's step divided by that of the network's step. The published 8.7 is that of "
    "F1; the others follow from it and from the times of NFNets in table 3 of arXiv 2102.06171. No times of "
    "EfficientNets are on record in this package."
)
_FAMILIES = (("NFNets", NFNETS, "#0072b2"), ("EfficientNets", EFFICIENTNETS, "#d55e00"))


def published_ratio(network: str) -> float | None:
    """Published time of EfficientNet-B7's step, divided by that of the network; None: there is none."""
    if network == REFERENCE:
        return 1.0
    if network not in published.STEP_MS:
        return None
    return published.B7_OVER_F1 * published.STEP_MS["nfnet_f1"] / published.STEP_MS[network]


def tables(found: Evidence) -> dict[str, str]:
    """Name of each table -> its text in Markdown.

    Raises:
      ConfigError: the evidence has another form.
    """
    steps = steps_of(found.data)
    columns = ["network", "devices", "px", "images", "at a time", "rematerialization", "memory", "step"]
    columns += ["FLOPs per cycle", "ratio", "published", "difference", "published top-1, %"]
    made = {"steps": markdown_table(columns, [_row(step) for step in steps])}
    if explained := list(_explained(steps)):
        made["operations"] = markdown_table(["network", "devices", "operation", "share of the step, %"], explained)
    return made


def text(found: Evidence) -> str:
    """Tables in Markdown, and what they mean.

    Raises:
      ConfigError: the evidence has another form.
    """
    steps, made = steps_of(found.data), tables(found)
    parts = [origin(found), _ESTIMATED if any(step.cycles for step in steps) else _MEASURED, _NOTE, made["steps"]]
    if "operations" in made:
        about = f"Most expensive operations where the ratio is more than {_FAR:.0%} from the published one, and of B7:"
        parts += [about, made["operations"]]
    return "\n\n".join(parts)


def _row(step: Step) -> list[str]:
    first = [step.network, step.place, f"{step.image_size}", f"{step.images}", f"{step.images_at_a_time}"]
    first += [step.rematerialization, "" if step.peak_bytes is None else human_size(step.peak_bytes)]
    ratio, top1 = published_ratio(step.network), PUBLISHED_TOP1_PERCENT.get(step.network)
    difference = "" if step.ratio is None or ratio is None else f"{step.ratio / ratio - 1:+.0%}"
    return [
        *first,
        _cell(step.problem) or _time(step),
        "" if step.cycles is None or step.flops is None else f"{step.flops / step.cycles:,.0f}",
        "" if step.ratio is None else f"{step.ratio:.2f}",
        "" if ratio is None else f"{ratio:.2f}",
        difference,
        "" if top1 is None else f"{top1}",
    ]


def _operation(name: str) -> str:
    """An operation in words: which pass, where in the network, and what it gives."""
    _, _, place = _cell(" ".join(name.split())).rpartition("shard_map/")
    for traced, words in (("transpose(jvp(network))/", "backward: "), ("jvp(network)/", "forward: ")):
        _, found, rest = place.partition(traced)  # before it are the loops over parts of the batch
        if found:
            return f"{words}`{rest}`"
    return f"`{place}`"


def _cell(text: str) -> str:
    """Text for a cell of a table, which a stroke would end."""
    return text.replace("|", "/")


def _time(step: Step) -> str:
    parts = [] if step.cycles is None else [f"{scaled(step.cycles)} cycles"]
    return " = ".join(parts if step.seconds is None else [*parts, duration(step.seconds)])


def is_far(step: Step) -> bool:
    """Whether the ratio of a step is far from the published one."""
    ratio = published_ratio(step.network)
    return step.ratio is not None and ratio is not None and abs(step.ratio / ratio - 1) > _FAR


def _explained(steps: Sequence[Step]) -> Iterator[list[str]]:
    places = {step.place for step in steps if is_far(step)}
    for step in steps:
        if step.place in places and step.cycles is not None and (is_far(step) or step.network == REFERENCE):
            for name, cycles in step.operations[:_NUM_OPERATIONS]:
                yield [step.network, step.place, _operation(name), f"{100 * cycles / step.cycles:.1f}"]


def picture(found: Evidence, width: float, height: float) -> "Figure":
    """Published accuracy over the time of the step relative to B7, a panel for each place. Width and height in inches.

    Raises:
      ConfigError: the evidence has another form.
    """
    from matplotlib.figure import Figure

    steps = steps_of(found.data)
    places = list(dict.fromkeys(step.place for step in steps))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(origin(found), int(_LETTERS_PER_INCH * width)), fontsize=8, parse_math=False)
    for axes, place in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        for label, names, colour in _FAMILIES:
            relative = {step.network: 1 / step.ratio for step in steps if step.place == place and step.ratio}
            _draw_family(axes, {name: relative[name] for name in names if name in relative}, label, colour)
        shown = {name: 1 / ratio for name in NFNETS if (ratio := published_ratio(name)) is not None}
        tops = [PUBLISHED_TOP1_PERCENT[name] for name in shown]
        axes.plot(list(shown.values()), tops, "o", mfc="none", color="#555555", label="NFNets, published on TPUv3")
        axes.set_title(place, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda time, place: f"1/{1 / time:.0f}" if time < 1 else f"{time:g}")
        axes.set_xlabel("time of the training step, B7 = 1")
        axes.set_ylabel("published top-1, %")
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _draw_family(axes: "Axes", relative: dict[str, float], label: str, colour: str) -> None:
    tops = [PUBLISHED_TOP1_PERCENT[name] for name in relative]
    axes.plot(list(relative.values()), tops, marker="o", markersize=4, color=colour, label=label)
    for (name, time), top in zip(relative.items(), tops, strict=True):
        axes.annotate(
            name.rpartition("_")[2].upper(), (time, top), textcoords="offset points", xytext=(4, -9), fontsize=8
        )
