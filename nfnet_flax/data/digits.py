"""scikit-learn's handwritten digits as a source of images."""

import dataclasses
import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.augment_config import AffineAugment
from nfnet_flax.data.random_access import ArraySource, SourceConfig, Split, check_memory

_HELD_OUT_EVERY = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsSource(SourceConfig):
    """scikit-learn's 1,797 handwritten digits, which it contains. They are enlarged to the recipe's image size."""

    def open(self, split: Split, image_size: int) -> ArraySource:
        return digits(split, image_size)

    def default_augment(self) -> AffineAugment:
        return AffineAugment()


def digits(split: Split, image_size: int) -> ArraySource:
    """scikit-learn's 1,797 handwritten 8x8 digits, enlarged (bicubic) to `image_size` and repeated over three channels.

    A fixed random fifth (360 images) is held out for evaluation. The images ship with scikit-learn.
    """
    from PIL import Image

    images, labels = _all_digits()
    chosen = _chosen(split, len(labels))
    field = "data.image_size" if split == "train" else "data.eval_image_size"
    num_bytes = 5 * len(chosen) * image_size**2  # single images, one array of them, and that array in three channels
    check_memory(field, image_size, num_bytes, f"{len(chosen)} digits of {image_size} px")
    grey = np.round(images[chosen] * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    enlarged = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey]
    in_colour = np.repeat(np.stack(enlarged)[..., None], 3, axis=3)
    return ArraySource(images=in_colour, labels=labels[chosen].astype(np.int32))


def num_digits(split: Split) -> int:
    """Number of images of a split."""
    return len(_chosen(split, len(_all_digits()[1])))


def _chosen(split: Split, count: int) -> np.ndarray:
    """Places of the images of a split among all of them."""
    order = np.random.default_rng(0).permutation(count)
    held_out = np.arange(count) % _HELD_OUT_EVERY == 0
    return order[held_out if split == "eval" else ~held_out]


@functools.cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) grey levels from 0 to 16, and (1797,) digits, in the order of scikit-learn's file."""
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("DigitsSource needs scikit-learn, which ships the digits: pip install scikit-learn")
    path = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if not path.is_file():  # another release may keep it elsewhere
        from sklearn.datasets import load_digits

        data = load_digits()
        return data.images, data.target
    # Read here because importing scikit-learn takes two seconds.
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
