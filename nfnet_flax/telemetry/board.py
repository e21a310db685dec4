"""What TensorBoard shows of a run's images: its first batch, and what the evaluations find."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from nfnet_flax.telemetry.outcomes import Outcomes
from nfnet_flax.telemetry.pictures import MAX_MATRIX_CLASSES, confusion_matrix, grid, thumbnails
from nfnet_flax.units import printable

Rows = Mapping[str, np.ndarray]

_MAX_IMAGES, _MAX_GRID_PIXELS = 25, 1_500_000
"""Largest number of images in a grid of training images, and of their pixels: event files are read at each resume."""
_NUM_WRONG = 16
_THUMBNAIL_SIDE = 112
"""Largest side of a wrong held-out image in its grid, in pixels."""
_MAX_LABELS = 3
"""Largest number of lines for the classes of an image with several of them."""
_MAX_CLASS_ROWS = 100
_FEW_CLASS_ROWS = 20
"""Number of rows of the table of classes, if there are more than `_MAX_CLASS_ROWS` classes."""


class SummaryLog(Protocol):
    """What writes for TensorBoard: `MetricsLog`."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...

    def write_histograms(self, step: int, histograms: Mapping[str, np.ndarray]) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out set of a run, and what is shown of its evaluations."""

    class_names: Sequence[str]
    """Names of the classes, in the order of the labels, with characters of any kind."""
    read: Callable[[list[int]], np.ndarray | None]
    """Reads examples by their indexes: images as the network gets them but for their normalization, (N, H, W, 3) uint8;
    None if they cannot be read."""
    prefix: str
    """`eval` or `eval_ema`: which parameters are shown. Those by which the best checkpoint is chosen."""
    has_images: bool
    """Whether there are pictures."""


def write_first_batch(log: SummaryLog, rows: Rows, class_names: Sequence[str]) -> None:
    """Shows the beginning of a run's first batch, as the network gets it but for its normalization.

    Args:
      log: where it is written, at step 0.
      rows: rows of the first batch, of this process: `image` (N, H, W, 3) uint8, `label` and, if the images are mixed,
        `mix_label` and `label_weight`.
      class_names: names of the classes, in the order of the labels.
    """
    images = rows["image"]
    count = min(len(images), _MAX_IMAGES, max(1, _MAX_GRID_PIXELS // images[0, :, :, 0].size))
    names = [printable(name) for name in class_names]
    captions = [caption_of(rows, row, names) for row in range(count)]
    log.write_images(0, {"train/first_batch": grid(images[:count], captions)})


def caption_of(rows: Rows, row: int, class_names: Sequence[str]) -> list[str]:
    """The caption of a training image: its classes, with their shares if it is mixed."""
    labels = [rows["label"][row]]
    weights = [1.0]
    if "mix_label" in rows:
        labels.append(rows["mix_label"][row])
        weights = [float(rows["label_weight"][row]), 1.0 - float(rows["label_weight"][row])]
    share_of = np.zeros(len(class_names))
    for label, weight in zip(labels, weights, strict=True):
        share_of += weight * (label if np.ndim(label) else np.arange(len(class_names)) == label)
    found = sorted(np.flatnonzero(share_of).tolist(), key=lambda label: -share_of[label])
    lines = [
        class_names[label] if share_of[label] > 0.9999 else f"{share_of[label]:.0%} {class_names[label]}"
        for label in found
    ]
    if len(lines) > _MAX_LABELS:
        lines[_MAX_LABELS - 1 :] = [f"and {len(lines) - _MAX_LABELS + 1} more"]
    return lines or ["(no class)"]


def write_outcomes(log: SummaryLog, step: int, outcomes_of: Mapping[str, Outcomes], held_out: HeldOut) -> None:
    """Shows what an evaluation found: the accuracy of the classes, which are taken for which, and the worst mistakes.

    Args:
      log: where it is written.
      step: step of the evaluation.
      outcomes_of: outcomes by the prefix of the metrics; empty if an image may have several classes, for which nothing
        is shown.
      held_out: the images.
    """
    outcomes = outcomes_of.get(held_out.prefix)
    if outcomes is None:
        return
    names, prefix = [printable(name) for name in held_out.class_names], held_out.prefix
    counts, right = outcomes.per_class(len(names))
    limit = _MAX_CLASS_ROWS if len(names) <= _MAX_CLASS_ROWS else _FEW_CLASS_ROWS
    log.write_texts(step, {f"{prefix}/classes": _classes_text(names, counts.tolist(), right.tolist(), limit=limit)})
    log.write_histograms(step, {f"{prefix}/accuracy_of_classes": right[counts > 0] / counts[counts > 0]})
    if not held_out.has_images:
        return
    pictures = {}
    if len(names) <= MAX_MATRIX_CLASSES:
        pictures[f"{prefix}/confusion"] = confusion_matrix(outcomes.confusion(len(names)), names)
    wrong = outcomes.most_confidently_wrong(_NUM_WRONG)
    if wrong.size and (images := held_out.read(outcomes.index[wrong].tolist())) is not None:
        captions = [_mistake(outcomes, row, names) for row in wrong]
        pictures[f"{prefix}/most_confidently_wrong"] = grid(thumbnails(images, _THUMBNAIL_SIDE), captions)
    log.write_images(step, pictures)


def _mistake(outcomes: Outcomes, row: int, names: Sequence[str]) -> list[str]:
    predicted = int(outcomes.predicted[row])
    # Outputs of the network beyond the classes of the images have no name.
    name = names[predicted] if predicted < len(names) else f"output {predicted}"
    return [f"{outcomes.probability[row]:.0%} {name}", f"is {names[outcomes.label[row]]}"]


def _classes_text(names: Sequence[str], counts: Sequence[int], right: Sequence[int], *, limit: int) -> str:
    """A table of the classes, those with the lowest accuracy first, in Markdown.

    Args:
      names: names of the classes.
      counts: number of held-out examples of each class; a class without any is left out.
      right: how many of them are predicted right.
      limit: largest number of rows.
    """
    rows = sorted((right[index] / counts[index], index) for index in range(len(names)) if counts[index])
    lines = [f"| {_cell(names[index])} | {share:.1%} | {counts[index]} |" for share, index in rows[:limit]]
    if len(rows) > limit:
        lines.append(f"\nThe other {len(rows) - limit} classes are predicted better, or as well.")
    return "\n".join(["| class | accuracy | images |", "|---|---:|---:|", *lines])


def _cell(name: str) -> str:
    return name.replace("\\", "\\\\").replace("|", "\\|")
