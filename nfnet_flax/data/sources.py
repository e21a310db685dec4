"""Random-access sets of labelled images: `len(source)`, `source[i]` -> `{"image": uint8 HWC, "label": int32}`."""

import dataclasses
from typing import Any, Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

Split = Literal["train", "eval"]
_HELD_OUT_EVERY = 5


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images and labels held in memory."""

    images: np.ndarray
    """(N, H, W, 3) uint8."""
    labels: np.ndarray
    """(N,) int32."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


def digits(split: Split, image_size: int) -> ArraySource:
    """scikit-learn's 1,797 handwritten 8x8 digits, enlarged (bicubic) to `image_size` and repeated over three channels.

    A fixed random fifth (360 images) is held out for evaluation. The images ship with scikit-learn.
    """
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    held_out = np.arange(len(order)) % _HELD_OUT_EVERY == 0
    chosen = order[held_out if split == "eval" else ~held_out]
    grey = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    enlarged = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey]
    images = np.repeat(np.stack(enlarged)[..., None], 3, axis=3)
    return ArraySource(images=images, labels=data.target[chosen].astype(np.int32))
