"""Settings of the input; apart from the pipeline, so that a recipe can be read where Grain is not installed."""

import dataclasses
from typing import Literal

from nfnet_flax.config import check_types, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from and what is done to them."""

    source: Literal["digits"] = "digits"
    """The set of images."""
    image_size: int = 32
    """Height and width in pixels."""
    batch_size: int = 64
    """Examples of one update, over all processes and devices."""
    eval_batch_size: int = 120
    """Examples of one evaluation batch, over all processes and devices."""
    max_degrees: float = 10.0
    """Augmentation: largest rotation."""
    max_scale: float = 0.1
    """Augmentation: largest relative change of size."""
    max_shift: float = 0.08
    """Augmentation: largest shift as a share of the image."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from the grey levels of each channel (ImageNet's)."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divides the grey levels of each channel (ImageNet's)."""
    num_threads: int = 2
    """Input threads of each process."""
    prefetch_batches: int = 4
    """Batches prepared ahead of the step."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("image_size", "batch_size", "eval_batch_size", "num_threads", "prefetch_batches"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        for name in ("max_degrees", "max_scale", "max_shift"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must not be negative")
        require(self.max_scale < 1, "data.max_scale", self.max_scale, "must be below 1")
        require(min(self.std) > 0, "data.std", self.std, "must be positive")
