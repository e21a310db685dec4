"""Claim: the networks are exactly the published ones, by their sizes, their outputs and the accuracy of released
weights.

`measured_*` measure, each one part; `tables` makes text of what was measured.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from nfnet_flax.claims.evidence import Evidence, markdown_table, origin
from nfnet_flax.claims.goldens import Agreement
from nfnet_flax.claims.published import SIZES, Figure
from nfnet_flax.claims.released import Accuracy
from nfnet_flax.config import ConfigError
from nfnet_flax.models import IMAGE_SIZES, build_model, model_config
from nfnet_flax.models.flops import forward_flops
from nfnet_flax.models.params import split
from nfnet_flax.models.registry import PUBLISHED
from nfnet_flax.progress import track

CLAIM = "exact"
NUM_VALIDATION = 50_000
"""Number of images of ImageNet's validation set, on which published accuracies were measured."""


_SIZES_NOTE = (
    "Sizes, counted in the networks at the published test resolution (px). Multiply-adds are those of convolutions and "
    "matrix products, which the papers call FLOPs. (rounding): the published figure is this one, rounded. Sources: "
    "code is the published Haiku code; FLOPs of NFNets are in table 3 of arXiv 2102.06171, EfficientNets in table 2 "
    "of arXiv 1905.11946."
)
_LOGITS_NOTE = (
    "Logits beside those of the published code on the same random parameters and images: the largest difference, as a "
    "share of the largest logit."
)
_NO_LOGITS = "Logits: left out. With --goldens tests/goldens, a folder of the repository, they are compared."
_ACCURACY_NOTE = (
    f"Accuracy of released weights. The published figures are of all {NUM_VALIDATION:,} images of ImageNet's "
    "validation set."
)
_NO_ACCURACY = (
    "Accuracy: left out. With --weights DIR, released weight files, and --images DIR, ImageNet's validation set, it is "
    "measured."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large a network with 1000 classes is, counted."""

    model: str
    parameters: int
    image_size: int
    """Test resolution, in pixels, at which the papers count."""
    multiply_adds: int
    """Of one image's forward pass: convolutions and matrix products."""


def check_models(names: Sequence[str]) -> tuple[str, ...]:
    """The networks to count; all that have a published figure if none is named.

    Raises:
      ConfigError: a network is unknown or has no published figure.
    """
    for name in names:
        model_config(name)
        if name not in SIZES:
            raise ConfigError(f"models: {name!r} has no published figure on record; known are {', '.join(SIZES)}")
    return tuple(dict.fromkeys(names)) or tuple(SIZES)


def measured_sizes(names: Sequence[str]) -> list[Size]:
    """Counts parameters and multiply-adds in the networks themselves; nothing is computed."""
    return [_size(name) for name in track(names, "counting", "networks")]


def _size(name: str) -> Size:
    model = nnx.eval_shape(lambda: build_model(model_config(name), num_classes=1000, rngs=nnx.Rngs(0)))
    image_size = IMAGE_SIZES[name].test
    return Size(
        model=name,
        parameters=sum(leaf.size for leaf in split(model)[1].values()),
        image_size=image_size,
        multiply_adds=forward_flops(model, image_size),
    )


def data_of(sizes: Sequence[Size], logits: Sequence[Agreement], accuracies: Sequence[Accuracy]) -> dict[str, Any]:
    """What was measured, for `evidence.json`."""
    return {
        "sizes": [dataclasses.asdict(size) for size in sizes],
        "logits": [dataclasses.asdict(entry) for entry in logits],
        "accuracy": [dataclasses.asdict(entry) for entry in accuracies],
    }


def tables(found: Evidence) -> dict[str, str]:
    """Name of each table -> its text in Markdown; parts that were not measured have none."""
    made = {
        "sizes": _sizes_table([Size(**entry) for entry in found.data["sizes"]]),
        "logits": _logits_table([Agreement(**entry) for entry in found.data["logits"]]),
        "accuracy": _accuracy_table([Accuracy(**entry) for entry in found.data["accuracy"]]),
    }
    return {name: text for name, text in made.items() if found.data[name]}


def text(found: Evidence) -> str:
    """All tables, what they show, and what was left out."""
    made = tables(found)
    parts = [origin(found), _SIZES_NOTE, made["sizes"]]
    parts += [_LOGITS_NOTE, made["logits"]] if "logits" in made else [_NO_LOGITS]
    parts += [_ACCURACY_NOTE, made["accuracy"]] if "accuracy" in made else [_NO_ACCURACY]
    return "\n\n".join(parts)


def _sizes_table(sizes: Sequence[Size]) -> str:
    columns = ["network", "parameters", "published", "difference", "px"]
    columns += ["multiply-adds", "published", "difference", "source"]
    rows = []
    for size in sizes:
        published = SIZES[size.model]
        rows.append(
            [
                size.model,
                f"{size.parameters:,}",
                *_compared(size.parameters, published.parameters),
                f"{size.image_size}",
                f"{size.multiply_adds / 1e9:.3f}B",
                *_compared(size.multiply_adds, published.multiply_adds),
                published.source,
            ]
        )
    return markdown_table(columns, rows)


def _compared(counted: int, published: Figure | None) -> list[str]:
    """A published figure, and the relative difference from it; empty if there is none."""
    if published is None:
        return ["", ""]
    if counted == published.value:
        return [published.text, "0"]
    difference = f"{(counted - published.value) / published.value:+.3%}"
    return [published.text, f"{difference} (rounding)" if published.contains(counted) else difference]


def _logits_table(found: Sequence[Agreement]) -> str:
    precisions = list(dict.fromkeys(name for entry in found for name in entry.difference))
    columns = ["golden", "parameters of the published code", "same names and shapes"]
    columns += [f"largest difference, {name}" for name in precisions]
    rows = [
        [
            entry.golden,
            f"{entry.num_parameters:,}",
            "yes" if entry.has_same_parameters else "NO",
            *(f"{entry.difference[name]:.1e}" if name in entry.difference else "" for name in precisions),
        ]
        for entry in found
    ]
    return markdown_table(columns, rows)


def _accuracy_table(found: Sequence[Accuracy]) -> str:
    columns = ["weights", "network", "px", "images", "top-1", "published", "top-5", "published", "preparation"]
    rows = []
    for entry in found:
        published = PUBLISHED.get(entry.model or "")
        top5 = None if published is None else published.top5_percent
        rows.append(
            [
                entry.weights,
                entry.model or "",
                f"{entry.image_size}",
                f"{entry.num_examples:,}",
                f"{entry.top1:.2%}",
                "" if published is None else f"{published.top1_percent}%",
                f"{entry.top5:.2%}",
                "" if top5 is None else f"{top5}%",
                entry.preparation,
            ]
        )
    return markdown_table(columns, rows)
