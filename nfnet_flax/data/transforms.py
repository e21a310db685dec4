"""Augmentations: functions of a record and a NumPy generator, run in the input threads."""

import numpy as np
from PIL import Image

Record = dict[str, np.ndarray]


def random_affine(
    record: Record, rng: np.random.Generator, *, max_degrees: float, max_scale: float, max_shift: float
) -> Record:
    """Turns, scales and shifts an image about its centre (bilinear; what enters is black).

    Args:
      record: with a (H, W, 3) uint8 `image`.
      rng: of this example.
      max_degrees: the angle is uniform in +-`max_degrees`.
      max_scale: the factor is uniform in 1 +- `max_scale`.
      max_shift: the shift along each axis is uniform in +-`max_shift` of its size.
    """
    image = record["image"]
    height, width = image.shape[:2]
    angle = np.deg2rad(rng.uniform(-max_degrees, max_degrees))
    scale = 1.0 + rng.uniform(-max_scale, max_scale)
    shift_x, shift_y = rng.uniform(-max_shift, max_shift, size=2) * (width, height)
    a, b = np.cos(angle) / scale, np.sin(angle) / scale
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    from_x, from_y = centre_x + shift_x, centre_y + shift_y
    inverse = (a, b, centre_x - a * from_x - b * from_y, -b, a, centre_y + b * from_x - a * from_y)
    moved = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, inverse, resample=Image.Resampling.BILINEAR
    )
    return {**record, "image": np.asarray(moved)}
