"""Settings of the input; separate from the pipeline, so that a recipe can be read where Grain is not installed."""

import dataclasses
from typing import Literal

from nfnet_flax.config import MAX_IMAGE_PX, check_types, require, require_count
from nfnet_flax.data.augment_config import AffineAugment, CropAugment, Resampler
from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
from nfnet_flax.data.source_config import DigitsSource, SourceConfig
from nfnet_flax.open_config import with_places_of

EXECUTION_FIELDS = ("num_threads", "num_workers", "prefetch_batches", "stall_timeout_s")
"""Fields of `DataConfig` that decide how batches are made and change no byte of them."""
RESUMABLE_FIELDS = (*EXECUTION_FIELDS, "on_corrupt")
"""Fields that may change at a resume. What is done about an image that cannot be decoded has decided no batch of a run
that such an image ended: with "skip", it goes on from where it was."""

_MAX_LANES = 4096
"""Threads or worker processes of one process: more than any machine has processors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from, what is done to them, and by how many threads or processes."""

    source: SourceConfig = dataclasses.field(default_factory=DigitsSource)
    """The set of images."""
    num_held_out: int | None = None
    """The first so many training examples are left out of training and take the place of the source's own held-out
    split; None: the source's own."""
    image_size: int = 32
    """Height and width of training images, in pixels."""
    eval_image_size: int = 32
    """Height and width of evaluation images, in pixels."""
    eval_crop_margin: int = 0
    """An evaluation image is resized to so many pixels more than `eval_image_size` on each side, then cropped at its
    centre (published: 32)."""
    resampler: Resampler = "area_cubic"
    """How evaluation images are resized, and training images under `AffineAugment`; `CropAugment` has its own."""
    batch_size: int = 64
    """Examples of one update, over all processes and devices."""
    eval_batch_size: int = 120
    """Examples of one evaluation batch, over all processes and devices."""
    augment: AffineAugment | CropAugment | None = None
    """What is done to each training image by itself; None: what suits the source, `CropAugment()` for photos and
    `AffineAugment()` for digits and noise, which have the network's size."""
    randaugment: RandAugmentConfig | None = None
    """RandAugment (arXiv 1909.13719) of training images; None: off."""
    mixing: MixingConfig | None = None
    """Mixup and CutMix of training images; None: both off."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """An image that cannot be decoded ends the run, or is replaced by the next example that can be and counted in the
    metric `data/num_corrupt`; in an evaluation it is then left out and counted in `eval/num_corrupt`."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean that is subtracted from the grey levels (0 to 255) of each channel; by default ImageNet's."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation by which the grey levels of each channel are divided then; by default ImageNet's."""
    num_threads: int = 2
    """Input threads of each process, where there are no worker processes. Reading, decoding and resizing run in them
    side by side, so they do as well as processes."""
    num_workers: int = 0
    """Worker processes of each process, for a source whose Python code holds the threads up; 0: threads."""
    prefetch_batches: int = 4
    """Batches that are ready or being prepared ahead of the step. Each thread or worker prepares one at a time."""
    stall_timeout_s: float = 300.0
    """A batch that takes longer than this ends the run, with the stacks of what is stuck."""

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
        """`augment`, or what suits the source where that is None."""
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
        """These settings with the images where `other` has them (`SourceConfig.place_fields`)."""
        return dataclasses.replace(self, source=with_places_of(self.source, other.source))

    def with_resumable_of(self, other: "DataConfig") -> "DataConfig":
        """These settings with what may change at a resume taken from `other`: `RESUMABLE_FIELDS`, and where the images
        lie (`SourceConfig.place_fields`)."""
        return dataclasses.replace(
            self.with_places_of(other), **{name: getattr(other, name) for name in RESUMABLE_FIELDS}
        )
