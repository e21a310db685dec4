"""Opening a split of labelled images: `len(source)`, `source[i]` -> `{"image": ..., "label": ...}`."""

import contextlib
from collections.abc import Sequence

import numpy as np

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.classes import with_classes
from nfnet_flax.data.random_access import CorruptRecordError, Source, SourceConfig, Split
from nfnet_flax.open_config import is_own


def open_source(
    config: SourceConfig, split: Split, image_size: int, class_names: Sequence[str] | None = None
) -> Source:
    """The examples of a split.

    Args:
      config: which set.
      split: which part of the set.
      image_size: height and width, in pixels, of the images that `DigitsSource` and `SyntheticSource` make; the other
        sources of the package return encoded files of any size.
      class_names: the wanted class names, in the order of the labels; None: the training split's own.

    Raises:
      ConfigError: the set is missing, empty, incomplete or of another kind, or it has a class that is not in
        `class_names`; the message says how to get the set. Or a user's source does not return what a source must.
      OSError: the disk or the network failed.
    """
    source = _opened(config, split, image_size)
    if class_names is None:
        class_names = source.class_names if split == "train" else config.training_classes(image_size)
        if len(class_names) < 2:
            raise ConfigError(f"the training split has only one class, {class_names[0]!r}: nothing can be learned")
    return with_classes(source, class_names, split, is_checked=not is_own(type(config)))


def own_class_names(config: SourceConfig, split: Split, image_size: int) -> tuple[str, ...]:
    """Names of the classes that a split itself has, in its own order; arguments and errors as for `open_source`."""
    return _opened(config, split, image_size).class_names


def _opened(config: SourceConfig, split: Split, image_size: int) -> Source:
    source = config.open(split, image_size)
    _check_opened(config, source)
    return source


def _check_opened(config: SourceConfig, source: object) -> None:
    opened_by = f"{type(config).__name__}.open"
    if not isinstance(source, Source):
        raise ConfigError(
            f"{opened_by} returned {type(source).__name__}: return an ArraySource, or an object with class_names, "
            "unused, __len__, __getitem__, fingerprint, contents and describe (nfnet_flax/data/random_access.py)"
        )
    names = source.class_names
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"{opened_by}: class_names = {names!r}: must be texts, each of them once")
    if len(source) < 1:
        raise ConfigError(f"{opened_by}: returned no examples")
    if is_own(type(config)):
        with contextlib.suppress(CorruptRecordError):  # reported when the example is read
            _check_example(f"{opened_by}: example 0", source[0], len(names), is_multi_label=config.is_multi_label)


def _check_example(named: str, record: object, num_classes: int, *, is_multi_label: bool) -> None:
    """Checks an example of a user's source; the package's own sources are known to return valid ones."""
    if not isinstance(record, dict) or not {"image", "label"} <= record.keys():
        raise ConfigError(f"{named} = {record!r}: must be a dict with image and label")
    image, label = record["image"], record["label"]
    is_pixels = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    remedy = "must be the bytes of an image file, or (H, W, 3) uint8 pixels"
    require(is_pixels or isinstance(image, bytes), f"{named}: image", type(image).__name__, remedy)
    if is_multi_label:
        is_row = (
            isinstance(label, np.ndarray) and label.shape == (num_classes,) and bool(np.all(label * label == label))
        )
        require(is_row, f"{named}: label", label, f"must be an array of {num_classes} zeros and ones")
        return
    is_label = isinstance(label, int | np.integer) and 0 <= label < num_classes
    require(bool(is_label), f"{named}: label", label, f"must be the number of a class, from 0 to {num_classes - 1}")
