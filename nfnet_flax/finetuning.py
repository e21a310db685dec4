"""What `recipes/finetune.py` and `nfnet probe` derive from given weights and images: sizes, preprocessing, splits."""

import dataclasses
from typing import cast

from nfnet_flax.config import require
from nfnet_flax.config_json import to_json
from nfnet_flax.data.augment_config import Resampler
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.recognition import packed_source
from nfnet_flax.data.source_config import CsvSource, FolderSource, SourceConfig
from nfnet_flax.models import IMAGE_SIZES, ImageSizes, ModelConfig
from nfnet_flax.models.registry import VARIANTS
from nfnet_flax.paths import local_path
from nfnet_flax.weights.portable import FREE_FIELDS, Preprocessing, WeightsInfo

_HELD_OUT_SHARE = 10
"""One of so many images is held out if the images are not split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenImages:
    """A set of images, and which of them are held out."""

    source: SourceConfig
    """The set."""
    class_names: tuple[str, ...]
    """Names of the classes of its training split, in the order of the labels."""
    num_train: int
    """Number of training images, without those that are held out."""
    num_held_out: int | None
    """Number of images of the training split to hold out, as `DataConfig` takes it; None: there is a held-out split."""


def given_images(
    data: str,
    *,
    image: str = "image",
    label: str = "label",
    separator: str | None = None,
    split_column: str | None = None,
    eval_file: str | None = None,
) -> GivenImages:
    """The images in a folder or a file. If they are not split, a tenth is held out.

    Args:
      data: folder with one folder of images for each class, or with `train/` and `val/` (or `eval/`, `test/`) of these;
        a `.csv` file; or a folder of Parquet or tar files, or one such file, see `ParquetSource` and
        `WebDatasetSource`.
      image: column with the names of the image files, or for Parquet files with the images.
      label: column with the class, or the classes; for tar files with JSON the entry with the class.
      separator: for a CSV file, as the following: text between the classes of one image, which may then have none;
        None: each image has one class.
      split_column: column that contains `train` or `val`; None: there is none.
      eval_file: CSV file of the held-out images; None: there is none.

    Raises:
      ConfigError: there are no such images, or too few.
    """
    path = local_path("data", data)
    source: SourceConfig
    if path.suffix.lower() == ".csv":
        has_split = split_column is not None or eval_file is not None
        source = CsvSource(
            file=data,
            image=image,
            label=label,
            separator=separator,
            allow_none=separator is not None,
            split_column=split_column,
            eval_file=eval_file,
        )
    elif (found := packed_source(data, path, image=image, label=label)) is not None:
        _refuse_csv_options(separator, split_column, eval_file)
        source, has_split = found
    else:
        require(path.is_dir(), "data", data, "give a folder of images, or of Parquet or tar files, or a .csv file")
        _refuse_csv_options(separator, split_column, eval_file)
        is_divided = (path / "train").is_dir()
        names = [name for name in ("val", "eval", "test") if is_divided and (path / name).is_dir()]
        has_split = bool(names)
        source = FolderSource(root=data, train="train" if is_divided else ".", eval=names[0] if names else "val")
    images = source.without_writing().open("train", 0)  # a command that only looks at the recipe changes nothing
    require(len(images) >= 2, "data", data, "has only one training image: give at least two")
    num_held_out = None if has_split else max(1, len(images) // _HELD_OUT_SHARE)
    return GivenImages(
        source=source,
        class_names=images.class_names,
        num_train=len(images) - (num_held_out or 0),
        num_held_out=num_held_out,
    )


def _refuse_csv_options(separator: str | None, split_column: str | None, eval_file: str | None) -> None:
    for name, value in (("separator", separator), ("split_column", split_column), ("eval_file", eval_file)):
        require(value is None, name, value, "only a .csv file has it: leave it out, or give data=FILE.csv")


def sizes_of(info: WeightsInfo) -> tuple[ImageSizes, Preprocessing]:
    """Sizes of the images in training and evaluation, and how those of an evaluation are prepared.

    Raises:
      ConfigError: the weights do not say it, and the network is none that was published.
    """
    name = next((name for name, config in VARIANTS.items() if _function(config) == _function(info.model)), None)
    known, seen_as = IMAGE_SIZES.get(name or ""), info.preprocessing
    if seen_as is None:
        remedy = "says nothing about its images: write a weight file with a Preprocessing (save_weights)"
        require(known is not None, "weights", info.source, remedy)
        assert known is not None
        plain = DataConfig()
        seen_as = Preprocessing(
            image_size=known.test, crop_margin=32, resampler=plain.resampler, mean=plain.mean, std=plain.std
        )
    # Weights that were made for images of another size than the published one are trained on that size.
    if known is not None and known.test == seen_as.image_size:
        return known, seen_as
    return ImageSizes(seen_as.image_size, seen_as.image_size), seen_as


def _function(config: ModelConfig) -> dict[str, object]:
    """The configuration of a network without what does not change the function that it computes."""
    return {name: value for name, value in to_json(config).items() if name not in FREE_FIELDS}


def data_config(images: GivenImages, seen_as: Preprocessing, *, train_size: int, batch_size: int) -> DataConfig:
    """Settings of the input for a network that expects images to be prepared in a given way; the augmentation is the
    default of the source."""
    return DataConfig(
        source=images.source,
        num_held_out=images.num_held_out,
        image_size=train_size,
        eval_image_size=seen_as.image_size,
        eval_crop_margin=seen_as.crop_margin,
        eval_keeps_aspect=seen_as.keeps_aspect,
        resampler=cast(Resampler, seen_as.resampler),  # `DataConfig` checks it
        mean=seen_as.mean,
        std=seen_as.std,
        batch_size=batch_size,
        eval_batch_size=batch_size,
        num_threads=4,
    )
