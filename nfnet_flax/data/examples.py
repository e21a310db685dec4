"""Reading, decoding and augmenting one example; errors name the example."""

import contextlib
from collections.abc import Iterator

import numpy as np

from nfnet_flax.data import transforms
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.decode import CorruptImageError
from nfnet_flax.data.randaugment import rand_augment
from nfnet_flax.data.random_access import CorruptRecordError, Record, Source

Rows = dict[str, np.ndarray]


def train_example(index: int, rng: np.random.Generator, *, config: DataConfig, source: Source) -> Rows:
    """A training example after its geometric augmentation.

    Args:
      index: index of the example in the source.
      rng: random generator of the example's position in the stream.
      config: augmentation and size, and what to do with a corrupt image.
      source: the training split.

    Returns:
      `image` (size, size, 3) uint8 and `label` (`label_of`). With `on_corrupt="skip"`, those of the first example from
      `index` on that can be decoded, and `is_corrupt`, a scalar float32: 1 if that example is not `index`.

    Raises:
      CorruptImageError: the image (with "skip": every image) cannot be decoded; the message names the example.
    """
    if config.on_corrupt == "raise":
        return _train_example(index, rng, config, source)
    for num_skipped in range(len(source)):
        with contextlib.suppress(CorruptImageError):
            example = _train_example((index + num_skipped) % len(source), rng, config, source)
            return {**example, "is_corrupt": np.asarray(num_skipped > 0, np.float32)}
    raise CorruptImageError(f"none of the {len(source)} training images can be decoded; {source.describe(0)} is one")


def _train_example(index: int, rng: np.random.Generator, config: DataConfig, source: Source) -> Rows:
    with naming(source, index):
        record = source[index]
        return {"image": _augmented(record["image"], rng, config), "label": label_of(record)}


def label_of(record: Record) -> np.ndarray:
    """The label of an example: a scalar int32, or a (classes,) uint8 row of zeros and ones."""
    label = record["label"]
    return np.asarray(label, np.int32 if np.ndim(label) == 0 else np.uint8)


def _augmented(image: bytes | np.ndarray, rng: np.random.Generator, config: DataConfig) -> np.ndarray:
    size, augment = config.image_size, config.chosen_augment()
    if isinstance(augment, CropAugment):
        return transforms.random_crop(image, rng, image_size=size, config=augment)
    whole = transforms.eval_crop(image, image_size=size, margin=0, resampler=config.resampler, keeps_aspect=False)
    return transforms.random_affine(whole, rng, augment)


def eval_example(position: int, *, config: DataConfig, source: Source) -> Rows:
    """An evaluation example, or padding at positions beyond the source.

    Returns:
      `image` (size, size, 3) uint8, `label` and `mask`, a scalar float32: 0 for padding and, with `on_corrupt="skip"`,
      for an image that cannot be decoded.

    Raises:
      CorruptImageError: the image cannot be decoded; the message names the example.
    """
    size = config.eval_image_size
    nothing: Rows = {
        "image": np.zeros((size, size, 3), np.uint8),
        "label": np.zeros(len(source.class_names), np.uint8)
        if config.source.is_multi_label
        else np.asarray(0, np.int32),
        "mask": np.asarray(0, np.float32),
    }
    if position >= len(source):
        return nothing
    try:
        with naming(source, position):
            record = source[position]
            image = transforms.eval_crop(
                record["image"],
                image_size=size,
                margin=config.eval_crop_margin,
                resampler=config.resampler,
                keeps_aspect=config.eval_keeps_aspect,
            )
    except CorruptImageError:
        if config.on_corrupt == "raise":
            raise
        return nothing
    return {"image": image, "label": label_of(record), "mask": np.asarray(1, np.float32)}


@contextlib.contextmanager
def naming(source: Source, index: int) -> Iterator[None]:
    """Adds the name of an example to the errors that are raised within the context."""
    try:
        yield
    except (CorruptImageError, CorruptRecordError) as error:
        if isinstance(error, CorruptRecordError):  # it names file and record
            text = f"{error} (example {index})"
        else:
            text = f"{source.describe(index)} (example {index}): {error}"
        remedy = (
            "repair it under the same name, or give --data.on-corrupt skip to go on without such images; remove it "
            "only before a run begins, because a run that has trained refuses another set. nfnet doctor --all-images, "
            "with --workdir or --recipe, names all that are damaged"
        )
        raise CorruptImageError(f"{text}: {remedy}") from error
    except Exception as error:
        error.add_note(f"in {source.describe(index)} (example {index})")
        raise


def rand_augment_example(example: Rows, rng: np.random.Generator, *, config: DataConfig) -> Rows:
    """An example whose image RandAugment has changed."""
    assert config.randaugment is not None
    return {**example, "image": rand_augment(example["image"], rng, config.randaugment)}


def rand_augment_rows(rows: Rows, rng: np.random.Generator, *, config: DataConfig) -> Rows:
    """A group of rows whose images RandAugment has changed; they use one random generator, one after the other."""
    assert config.randaugment is not None
    return {**rows, "image": np.stack([rand_augment(image, rng, config.randaugment) for image in rows["image"]])}
