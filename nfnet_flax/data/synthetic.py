"""Noise as a source of images."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from nfnet_flax.config import MAX_COUNT, require, require_count
from nfnet_flax.config_json import ADDED_LATER
from nfnet_flax.data.augment_config import AffineAugment
from nfnet_flax.data.random_access import Record, SourceConfig, Split, check_index, digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSource(SourceConfig):
    """Noise of the recipe's image size, which takes no time to read: for timing a step without its input, or
    debugging."""

    num_train_examples: int = 1_281_167
    """Number of training examples; by default as many as ImageNet has."""
    num_eval_examples: int = 50_000
    """Number of held-out examples; by default as many as ImageNet has."""
    num_classes: int = 1000
    """Number of classes; example i has the label i modulo this number."""
    several_classes: bool = dataclasses.field(default=False, metadata=ADDED_LATER)
    """Whether labels are rows of zeros and ones: example i then also has the next class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_train_examples", "num_eval_examples"):
            require_count(f"source.{name}", getattr(self, name))
        remedy = f"must be 2 to {MAX_COUNT:,}"
        require(2 <= self.num_classes <= MAX_COUNT, "source.num_classes", self.num_classes, remedy)

    @property
    def is_multi_label(self) -> bool:
        return self.several_classes

    def open(self, split: Split, image_size: int) -> "SyntheticImages":
        num_examples = self.num_train_examples if split == "train" else self.num_eval_examples
        kind = MultiLabelNoise if self.several_classes else SyntheticImages
        return kind(split, num_examples, self.num_classes, image_size)

    def default_augment(self) -> AffineAugment:
        return AffineAugment()


class SyntheticImages:
    """Noise that is made once: each image is a window on the same bytes, so that reading one takes no time."""

    _NUM_WINDOWS = 4096
    _WINDOW_STEP = 1009  # prime to the number of windows, and no multiple of the three channels

    def __init__(self, split: Split, num_examples: int, num_classes: int, image_size: int) -> None:
        """Makes the noise.

        Args:
          split: which split; both have different noise.
          num_examples: number of examples. Images repeat after 4096.
          num_classes: number of classes; example i has the label i modulo this number.
          image_size: height and width in pixels.
        """
        self._arguments = (split, num_examples, num_classes, image_size)
        self.class_names = tuple(map(str, range(num_classes)))
        self.unused = ()
        self._num_examples = num_examples
        self._shape = (image_size, image_size, 3)
        # A hash of any length gives the same bytes on every machine and in every version of NumPy. The array is
        # read-only, as the bytes are: changing one image in place would change other images.
        num_bytes = image_size * image_size * 3 + self._NUM_WINDOWS
        self._noise = np.frombuffer(hashlib.shake_128(split.encode()).digest(num_bytes), np.uint8)

    def __reduce__(self) -> Any:
        return (type(self), self._arguments)  # cheaper to make anew than to send to a worker

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, self._num_examples)
        start = index * self._WINDOW_STEP % self._NUM_WINDOWS
        height, width, channels = self._shape
        image = self._noise[start : start + height * width * channels].reshape(self._shape)
        return {"image": image, "label": np.int32(index % len(self.class_names))}

    def fingerprint(self) -> str:
        return digest("synthetic", *map(str, self._arguments))

    def contents(self) -> str:
        return ""

    def describe(self, index: int) -> str:
        return f"synthetic image {check_index(index, self._num_examples)}"


class MultiLabelNoise(SyntheticImages):
    """The same with labels that are rows of zeros and ones: example i has class i and the next one."""

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        row = np.zeros(len(self.class_names), np.uint8)
        row[[record["label"], (record["label"] + 1) % len(row)]] = 1
        return {**record, "label": row}
