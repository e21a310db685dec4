"""Settings of the input. They are separate from the pipeline, so that a recipe can be read without Grain."""

import dataclasses
from typing import Literal

from nfnet_flax.config import MAX_IMAGE_PX, check_types, require, require_count
from nfnet_flax.config_json import ADDED_LATER
from nfnet_flax.data.augment_config import AffineAugment, CropAugment, Resampler
from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
from nfnet_flax.data.source_config import DigitsSource, SourceConfig
from nfnet_flax.open_config import with_places_of

EXECUTION_FIELDS = ("num_threads", "num_workers", "prefetch_batches", "stall_timeout_s")
"""Fields of `DataConfig` that say how batches are computed and do not change their contents."""
RESUMABLE_FIELDS = (*EXECUTION_FIELDS, "on_corrupt")
"""Fields that may change when a run continues. `on_corrupt` is one of them because it has changed no batch of a run
that a corrupt image ended: with "skip", that run continues from where it was."""

_MAX_LANES = 4096
"""Largest number of threads or worker processes of one process: more than any machine has processors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from, what is done to them, and by how many threads or processes."""

    source: SourceConfig = dataclasses.field(default_factory=DigitsSource)
    """The set of images."""
    num_held_out: int | None = None
    """Number of training examples, the first ones, that are left out of training and used for evaluation instead of the
    source's held-out split; None: the source's held-out split is used."""
    image_size: int = 32
    """Height and width of training images, in pixels."""
    eval_image_size: int = 32
    """Height and width of evaluation images, in pixels."""
    eval_crop_margin: int = 0
    """Number of pixels by which height and width of a resized evaluation image exceed `eval_image_size`; its centre is
    then cropped (published: 32)."""
    eval_keeps_aspect: bool = dataclasses.field(default=False, metadata=ADDED_LATER)
    """Whether the shorter side of an evaluation image is resized to `eval_image_size + eval_crop_margin` and the other
    one in proportion, as most networks of timm expect it; False: both sides to the same length (published)."""
    resampler: Resampler = "area_cubic"
    """Method that resizes evaluation images, and training images with `AffineAugment`; `CropAugment` has its own."""
    batch_size: int = 64
    """Number of examples of one update, over all processes and devices."""
    eval_batch_size: int = 120
    """Number of examples of one evaluation batch, over all processes and devices."""
    augment: AffineAugment | CropAugment | None = None
    """Geometric augmentation of each training image; None: the default of the source, which is `CropAugment()` for
    photos and `AffineAugment()` for digits and noise, which already have the network's size."""
    randaugment: RandAugmentConfig | None = None
    """RandAugment (arXiv 1909.13719) of training images; None: off."""
    mixing: MixingConfig | None = None
    """Mixup and CutMix of training images; None: both off."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What happens with an image that cannot be decoded. `raise`: it ends the run. `skip`: in training, the next
    example that can be decoded replaces it, counted in the metric `data/num_corrupt`; an evaluation leaves it out,
    counted in `eval/num_corrupt`."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean that is subtracted from the grey levels (0 to 255) of each channel; by default ImageNet's."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation by which the grey levels of each channel are then divided; by default ImageNet's."""
    num_threads: int = 2
    """Number of input threads of each process, used if there are no worker processes. Reading, decoding and resizing
    run in parallel in them, so for most sources they are as fast as processes."""
    num_workers: int = 0
    """Number of worker processes of each process, for a source whose Python code blocks the threads; 0: use threads."""
    prefetch_batches: int = 4
    """Number of batches that are ready or in preparation ahead of the step. Each thread or worker prepares one at a
    time."""
    stall_timeout_s: float = 300.0
    """Longest time to wait for a batch, in seconds; after it the run ends and prints the stacks of what is stuck."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("image_size", "eval_image_size"):
            require_count(f"data.{name}", getattr(self, name), most=MAX_IMAGE_PX)
        for name in ("batch_size", "eval_batch_size", "prefetch_batches"):
            require_count(f"data.{name}", getattr(self, name))
        require_count("data.num_threads", self.num_threads, most=_MAX_LANES)
        require(self.num_workers <= _MAX_LANES, "data.num_workers", self.num_workers, f"must be at most {_MAX_LANES:,}")
        for name in ("eval_crop_margin", "num_workers"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must not be negative")
        require(
            self.num_held_out is None or self.num_held_out >= 1,
            "data.num_held_out",
            self.num_held_out,
            "must be at least 1 or None",
        )
        require(min(self.std) > 0, "data.std", self.std, "must be positive")
        require(self.stall_timeout_s >= 1, "data.stall_timeout_s", self.stall_timeout_s, "must be at least 1")
        self._check_fit()

    def chosen_augment(self) -> AffineAugment | CropAugment:
        """`augment`, or the default of the source if that is None."""
        return self.source.default_augment() if self.augment is None else self.augment

    def _check_fit(self) -> None:
        """Checks fields against one another."""
        widest = self.eval_image_size + self.eval_crop_margin
        remedy = f"must be at most {MAX_IMAGE_PX:,} together with data.eval_image_size = {self.eval_image_size}"
        require(widest <= MAX_IMAGE_PX, "data.eval_crop_margin", self.eval_crop_margin, remedy)
        if self.mixing is not None:
            group_size = self.mixing.group_size
            remedy = f"must be divisible by data.mixing.group_size = {group_size}"
            require(self.batch_size % group_size == 0, "data.batch_size", self.batch_size, remedy)
        name, count = ("num_workers", self.num_workers) if self.num_workers > 0 else ("num_threads", self.num_threads)
        remedy = f"must be at least data.{name} = {count}, as each prepares one batch at a time"
        require(self.prefetch_batches >= count, "data.prefetch_batches", self.prefetch_batches, remedy)

    def with_execution_of(self, other: "DataConfig") -> "DataConfig":
        """These settings with the `EXECUTION_FIELDS` of `other`."""
        return dataclasses.replace(self, **{name: getattr(other, name) for name in EXECUTION_FIELDS})

    def with_places_of(self, other: "DataConfig") -> "DataConfig":
        """These settings with the paths of images of `other` (`SourceConfig.place_fields`)."""
        return dataclasses.replace(self, source=with_places_of(self.source, other.source))

    def with_resumable_of(self, other: "DataConfig") -> "DataConfig":
        """These settings with those of `other` that may change when a run continues: `RESUMABLE_FIELDS`, and the paths
        of the images (`SourceConfig.place_fields`)."""
        return dataclasses.replace(
            self.with_places_of(other), **{name: getattr(other, name) for name in RESUMABLE_FIELDS}
        )
