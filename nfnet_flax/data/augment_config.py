"""Settings of the geometric augmentations. They are separate, so that a recipe can be read without OpenCV."""

import dataclasses
from typing import Literal

from nfnet_flax.config import check_types, require

Resampler = Literal["area_cubic", "pillow_bicubic", "pillow_bilinear"]
"""Methods of resizing an image; `transforms.resize` describes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AffineAugment:
    """A small random rotation, scaling and shift, for images that already have the network's size, such as digits."""

    max_degrees: float = 10.0
    """Largest rotation, in degrees."""
    max_scale: float = 0.1
    """Largest relative change of size."""
    max_shift: float = 0.08
    """Largest shift as a share of the image."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in dataclasses.asdict(self).items():
            require(value >= 0, f"AffineAugment.{name}", value, "must not be negative")
        require(self.max_scale < 1, "AffineAugment.max_scale", self.max_scale, "must be below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropAugment:
    """A random part of the image, resized to the network's size, and a random flip: the published training input."""

    min_area: float = 0.08
    """Smallest area of the crop as a share of the image's."""
    max_area: float = 1.0
    """Largest area of the crop as a share of the image's."""
    min_aspect: float = 3 / 4
    """Smallest width / height of the crop."""
    max_aspect: float = 4 / 3
    """Largest width / height of the crop."""
    num_tries: int = 10
    """Number of random crops that are tried; if none fits into the image, its centre is used."""
    flip: bool = True
    """Whether half of the images are mirrored left to right."""
    resampler: Resampler = "area_cubic"
    """Method that resizes the crop."""

    def __post_init__(self) -> None:
        check_types(self)
        areas, aspects = (self.min_area, self.max_area), (self.min_aspect, self.max_aspect)
        require(
            0 < self.min_area <= self.max_area <= 1,
            "CropAugment.(min_area, max_area)",
            areas,
            "must be shares of the image above 0, at most 1, in ascending order",
        )
        require(
            0 < self.min_aspect <= self.max_aspect,
            "CropAugment.(min_aspect, max_aspect)",
            aspects,
            "must be positive and in ascending order",
        )
        require(self.num_tries >= 1, "CropAugment.num_tries", self.num_tries, "must be at least 1")
