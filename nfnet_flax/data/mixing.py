"""Mixup and CutMix within small groups of rows, in uint8.

A group lies within one process and is mixed without any other image, so a mixed batch does not depend on the number of
processes. The published code mixes pairs of images and so reads two for each row of the batch; here every row is mixed
with the next one of its half, and each image is read once.
"""

import math

import cv2
import numpy as np

from nfnet_flax.config import require
from nfnet_flax.data.mixing_config import MixingConfig

Rows = dict[str, np.ndarray]
# Mixup's ratios are multiples of 2^-16: products with 8-bit levels are then exact in float32, on every processor, and
# the weight of the label is the weight of the pixels.
_RATIO_STEPS = 65536


def mix(rows: Rows, rng: np.random.Generator, config: MixingConfig) -> Rows:
    """Mixes each image of one group with another of the same group.

    With both mixup and CutMix, the first half of the group gets mixup and the second half CutMix. The partner of a row
    is the next row of its half; that of the last row is the first.

    Args:
      rows: `image` (m, H, W, 3) uint8 and `label` (m,) int32, m = `config.group_size`; they are not changed.
      rng: random generator of this group.
      config: which of the two methods to use, or both.

    Returns:
      `rows` with mixed images, `mix_label` (m,) int32, the partner's label, and `label_weight` (m,) float32, the share
      of `label`'s own image; that of `mix_label` is `1 - label_weight`.

    Raises:
      ConfigError: there are more or fewer rows than `config.group_size`.
    """
    images, labels = rows["image"], rows["label"]
    require(len(labels) == config.group_size, "data.mixing.group_size", config.group_size, f"got {len(labels)} rows")
    num_mixup = 0 if config.mixup_alpha is None else len(labels) // (2 if config.cutmix else 1)
    partners = np.concatenate([np.roll(half, -1) for half in np.split(np.arange(len(labels)), [num_mixup])])
    mixed, weights = np.empty_like(images), np.empty(len(labels), np.float32)
    for row, partner in enumerate(partners):
        if row < num_mixup:
            assert config.mixup_alpha is not None
            mixed[row], weights[row] = _mixup(images[row], images[partner], rng, config.mixup_alpha)
        else:
            mixed[row], weights[row] = _cutmix(images[row], images[partner], rng)
    return {**rows, "image": mixed, "mix_label": labels[partners], "label_weight": weights}


def _mixup(image: np.ndarray, other: np.ndarray, rng: np.random.Generator, alpha: float) -> tuple[np.ndarray, float]:
    ratio = round(rng.beta(alpha, alpha) * _RATIO_STEPS) / _RATIO_STEPS
    return cv2.addWeighted(image, ratio, other, 1.0 - ratio, 0.0), ratio


def _cutmix(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Pastes a box of the other image; its share of the area is uniform, before the image's edges cut the box off."""
    height, width = image.shape[:2]
    (top, bottom), (left, right) = _box(height, width, rng)
    mixed = image.copy()
    mixed[top:bottom, left:right] = other[top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def _box(height: int, width: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    side = math.sqrt(rng.random())
    spans = []
    for size in (height, width):
        center, half = int(rng.integers(size)), int(side * size) // 2
        spans.append((max(0, center - half), min(size, center + half)))
    return spans
