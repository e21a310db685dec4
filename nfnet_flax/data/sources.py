"""Random-access sets of labelled images: `len(source)`, `source[i]` -> `{"image": ..., "label": int32}`."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nfnet_flax.config import ConfigError
from nfnet_flax.data import array_record_source, tfds_records
from nfnet_flax.data.array_record_source import ArrayRecords
from nfnet_flax.data.classes import with_classes
from nfnet_flax.data.image_folder import ImageFolder, class_folders
from nfnet_flax.data.random_access import CorruptRecordError as CorruptRecordError
from nfnet_flax.data.random_access import Record, Split, Unused, check_index, check_memory, digest
from nfnet_flax.data.random_access import Source as Source
from nfnet_flax.data.random_access import split_off as split_off
from nfnet_flax.data.source_config import (
    ArrayRecordSource,
    DigitsSource,
    FolderSource,
    SourceConfig,
    SyntheticSource,
    TfdsSource,
)
from nfnet_flax.data.tfds_records import TfdsRecords
from nfnet_flax.paths import local_path

_HELD_OUT_EVERY = 5


def open_source(
    config: SourceConfig, split: Split, image_size: int, class_names: Sequence[str] | None = None
) -> Source:
    """The examples of a split.

    Args:
      config: which set.
      split: which part of it.
      image_size: height and width, in pixels, of what `DigitsSource` and `SyntheticSource` make; the others give
        encoded files of any size.
      class_names: in the order of the labels; None: the training split's own.

    Raises:
      ConfigError: the set is missing, empty, incomplete or of another kind, or it has a class that is not in
        `class_names`; the message says how to get it.
      OSError: the disk or the network failed.
    """
    source = _open(config, split, image_size)
    if class_names is None:
        class_names = source.class_names if split == "train" else _training_classes(config, source)
        if len(class_names) < 2:
            raise ConfigError(f"the training split has only one class, {class_names[0]!r}: nothing can be learned")
    return with_classes(source, class_names, split)


def _open(config: SourceConfig, split: Split, image_size: int) -> Source:
    """The examples of a split with its own classes."""
    match config:
        case DigitsSource():
            return digits(split, image_size)
        case SyntheticSource():
            num_examples = config.num_train_examples if split == "train" else config.num_eval_examples
            return SyntheticImages(split, num_examples, config.num_classes, image_size)
        case FolderSource():
            folder = _folder(config, split)
            if split == "eval" and not folder.exists():
                raise ConfigError(
                    f"image folder {str(folder)!r} does not exist: give that of the held-out images by "
                    "--data.source.eval; a run that has not begun can hold out training images by "
                    "--data.num-held-out 1000"
                )
            return ImageFolder(folder)
        case ArrayRecordSource():
            return ArrayRecords(config, split)
        case TfdsSource():
            return TfdsRecords(config, split)


def _training_classes(config: SourceConfig, eval_source: Source) -> Sequence[str]:
    """The classes of the training split, found without its examples."""
    match config:
        case FolderSource():
            return class_folders(_folder(config, "train"))
        case ArrayRecordSource():
            return array_record_source.listed_classes(config, "train")
        case _:  # both splits share one list
            return eval_source.class_names


def _folder(config: FolderSource, split: Split) -> Path:
    field, name = ("source.train", config.train) if split == "train" else ("source.eval", config.eval)
    return local_path(field, local_path("source.root", config.root) / name)


def check_outside(config: SourceConfig, field: str, place: Path) -> None:
    """Raises ConfigError where a folder that is to be written lies in a split of images, as which it would be read.

    Args:
      config: of the images.
      field: names the folder in the message.
      place: the folder, as `local_path` gives it.
    """
    if not isinstance(config, FolderSource):
        return
    splits: tuple[Split, ...] = ("train", "eval")
    for folder in (_folder(config, split) for split in splits):
        if place.is_relative_to(folder):
            raise ConfigError(
                f"{field} = {str(place)!r}: lies in the image folder {str(folder)!r}, in which every folder is a "
                "class: give one outside"
            )


def check_apart(config: SourceConfig) -> None:
    """Raises ConfigError where the held-out split of a set holds examples of its training split."""
    match config:
        case FolderSource():
            if _folder(config, "train") == _folder(config, "eval"):
                raise ConfigError(
                    f"source.train = {config.train!r} and source.eval = {config.eval!r} are one folder: an evaluation "
                    "on what is trained on says nothing; give another folder of images, or hold images out from the "
                    "beginning of a run by --data.num-held-out"
                )
        case ArrayRecordSource():
            array_record_source.check_apart(config)
        case TfdsSource():
            tfds_records.check_apart(config)


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images and labels held in memory."""

    images: np.ndarray
    """(N, H, W, 3) uint8."""
    labels: np.ndarray
    """(N,) int32."""
    unused: tuple[Unused, ...] = ()
    """Nothing is left out."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.labels.max() + 1)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Record:
        index = check_index(index, len(self))
        return {"image": self.images[index], "label": self.labels[index]}

    def fingerprint(self) -> str:
        return digest("arrays", str(self.images.shape), self.images.tobytes(), self.labels.tobytes())

    def contents(self) -> str:
        return ""

    def describe(self, index: int) -> str:
        return f"image {check_index(index, len(self))} of {len(self)} in memory"


def digits(split: Split, image_size: int) -> ArraySource:
    """scikit-learn's 1,797 handwritten 8x8 digits, enlarged (bicubic) to `image_size` and repeated over three channels.

    A fixed random fifth (360 images) is held out for evaluation. The images ship with scikit-learn.
    """
    images, labels = _all_digits()
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = np.arange(len(order)) % _HELD_OUT_EVERY == 0
    chosen = order[held_out if split == "eval" else ~held_out]
    field = "data.image_size" if split == "train" else "data.eval_image_size"
    num_bytes = 5 * len(chosen) * image_size**2  # each by itself, all in one array, and that in three channels
    check_memory(field, image_size, num_bytes, f"{len(chosen)} digits of {image_size} px")
    grey = np.round(images[chosen] * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    enlarged = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey]
    in_colour = np.repeat(np.stack(enlarged)[..., None], 3, axis=3)
    return ArraySource(images=in_colour, labels=labels[chosen].astype(np.int32))


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


class SyntheticImages:
    """Noise that is made once: each image is a window on the same bytes, so that reading one costs nothing."""

    _NUM_WINDOWS = 4096
    _WINDOW_STEP = 1009  # prime to the number of windows, and no multiple of the three channels

    def __init__(self, split: Split, num_examples: int, num_classes: int, image_size: int) -> None:
        """Makes the noise.

        Args:
          split: the two have different noise.
          num_examples: N. Images repeat after 4096.
          num_classes: labels run through them in turn.
          image_size: height and width in pixels.
        """
        self._arguments = (split, num_examples, num_classes, image_size)
        self.class_names = tuple(map(str, range(num_classes)))
        self.unused = ()
        self._num_examples = num_examples
        self._shape = (image_size, image_size, 3)
        # An extendable hash gives the same bytes on every machine and in every version of NumPy. The array is
        # read-only, as the bytes are: an image changed in place would change its neighbours.
        num_bytes = image_size * image_size * 3 + self._NUM_WINDOWS
        self._noise = np.frombuffer(hashlib.shake_128(split.encode()).digest(num_bytes), np.uint8)

    def __reduce__(self) -> Any:
        return (SyntheticImages, self._arguments)  # cheaper to make anew than to send to a worker

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
