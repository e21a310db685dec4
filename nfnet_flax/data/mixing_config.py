"""Settings of RandAugment and of mixing. They are separate, so that a recipe can be read without OpenCV."""

import dataclasses
from typing import Literal

from nfnet_flax.config import check_types, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719) with the 16 operations of the NFNet code."""

    num_layers: int = 4
    """Number of operations applied one after the other; each is drawn at random from the 16."""
    magnitude: float = 5.0
    """Strength of all operations; the published networks use 5, 10 and 15."""
    order: Literal["after_mixing", "before_mixing"] = "after_mixing"
    """Whether an image is augmented after it was mixed with another one (NFNet) or before; no effect without mixing."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.num_layers >= 1, "data.randaugment.num_layers", self.num_layers, "must be at least 1; use None")
        require(0 <= self.magnitude <= 30, "data.randaugment.magnitude", self.magnitude, "must lie in [0, 30]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of images of the same group."""

    group_size: int = 16
    """Number of consecutive rows of the batch that are mixed with one another; it must divide the rows of every
    process."""
    mixup_alpha: float | None = 0.2
    """Parameter of mixup, whose ratio is drawn from Beta(alpha, alpha); None: no mixup."""
    cutmix: bool = True
    """Whether CutMix is used; together with mixup, the first half of each group gets mixup and the second CutMix."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.mixup_alpha is not None:
            require(self.mixup_alpha > 0, "data.mixing.mixup_alpha", self.mixup_alpha, "must be positive or None")
        require(
            self.cutmix or self.mixup_alpha is not None,
            "data.mixing.cutmix",
            self.cutmix,
            "nothing is left to mix: give mixup_alpha, or use data.mixing = None",
        )
        both = self.cutmix and self.mixup_alpha is not None
        smallest = 4 if both else 2
        require(
            self.group_size >= smallest and self.group_size % (2 if both else 1) == 0,
            "data.mixing.group_size",
            self.group_size,
            "must be even and at least 4 for mixup and CutMix together, at least 2 for one of them",
        )
