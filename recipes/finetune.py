"""Fine-tunes a network, whose weights are given, on images of your own: a folder, or a CSV file that lists them.

Paper: Brock et al. 2021, arXiv 2102.06171 (AGC; section 6 fine-tunes NFNets); Clark et al. 2020, arXiv 2003.10555 (a
  learning rate that decreases from the head to the stem).
Data: a folder with one folder of images per class, or with `train/` and `val/` of these; or a `.csv` file, see
  `CsvSource`. Without a held-out split, a tenth of the images is held out.
Command: nfnet train recipes/finetune.py:weights=weights.safetensors,data=photos --workdir runs/photos
Others: weights=timm/eca_nfnet_l0.ra2_in1k (a model hub), weights=runs/other (a run); data=photos.csv,label=species;
  separator=; for several classes per image. Any option of a recipe may follow, such as --num-epochs 50.

Network, image sizes and normalization are those of the weights, class names those of the data. The new head starts at
zero and is trained alone at first. One part per batch is the fastest way on one device, and needs one: to use several,
give num_parts=8, which also gives other last bits.
"""

import math
from pathlib import Path

from nfnet_flax.config import require
from nfnet_flax.config_json import to_json
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import CsvSource, FolderSource, SourceConfig
from nfnet_flax.models import IMAGE_SIZES, ExecutionConfig, ImageSizes, ModelConfig
from nfnet_flax.models.registry import VARIANTS
from nfnet_flax.objectives import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nfnet_flax.optim import AGC, AdamW, OptimConfig, ParamGroup
from nfnet_flax.paths import local_path
from nfnet_flax.recipe import CheckpointConfig, Recipe
from nfnet_flax.training.reading import weights_of
from nfnet_flax.weights.portable import FREE_FIELDS, Preprocessing, WeightsInfo


def recipe(
    weights: str,
    data: str,
    image: str = "image",
    label: str = "label",
    separator: str | None = None,
    split_column: str | None = None,
    eval_file: str | None = None,
    batch_size: int = 64,
    num_epochs: float = 20.0,
    head_epochs: float = 2.0,
    num_parts: int = 1,
    flip: bool = True,
) -> Recipe:
    """The run.

    Args:
      weights: a weight file, the folder of a run, a folder with timm's `config.json`, or a name in a model hub.
      data: folder of images, or a `.csv` file.
      image: for a CSV file, the column with the names of the image files.
      label: the column with the class.
      separator: text between the classes of one image; None: each image has one class.
      split_column: column that contains `train` or `val`; None: there is none.
      eval_file: CSV file of the held-out images; None: there is none.
      batch_size: number of images of one update.
      num_epochs: length of the run, in epochs.
      head_epochs: number of epochs in which only the head is trained.
      num_parts: number of parts of a batch, a power of two: the largest number of devices.
      flip: whether training images are mirrored at random; not for digits or letters.
    """
    info, _ = weights_of(weights)
    sizes, seen_as = _sizes(info)
    source = _source(data, image, label, separator, split_column, eval_file)
    class_names, num_examples, num_held_out = _count(source, seen_as.image_size)
    num_trained = num_examples - (num_held_out or 0)
    steps_per_epoch = math.ceil(num_trained / batch_size)
    best = "mean_average_precision" if source.is_multi_label else "top1"
    return Recipe(
        name=f"finetune_{Path(data).stem or 'images'}",
        model=info.model,
        num_classes=len(class_names),
        data=DataConfig(
            source=source,
            num_held_out=num_held_out,
            image_size=sizes.train,
            eval_image_size=seen_as.image_size,
            eval_crop_margin=seen_as.crop_margin,
            eval_keeps_aspect=seen_as.keeps_aspect,
            resampler=seen_as.resampler,  # type: ignore[arg-type] # checked when it is made
            mean=seen_as.mean,
            std=seen_as.std,
            batch_size=batch_size,
            eval_batch_size=batch_size,
            augment=CropAugment(min_area=0.35, flip=flip),
            num_threads=4,
        ),
        optim=OptimConfig(
            method=AdamW(),
            clipping=AGC(ratio=0.05),
            learning_rate=1e-3,
            learning_rate_per_256=None,
            weight_decay=0.05,
            warmup_epochs=min(1.0, num_epochs / 10),
            layer_decay=0.75,
            trained_from_epoch=(ParamGroup("head.*", 0.0), ParamGroup("*", min(head_epochs, num_epochs / 4))),
            ema_decay=0.99,
        ),
        execution=ExecutionConfig(num_microbatches=num_parts),
        checkpoint=CheckpointConfig(every_steps=steps_per_epoch, best_metric=f"eval_ema/{best}"),
        init_from=weights,
        init_to_zero=("head.*",),
        num_epochs=num_epochs,
        objective=SigmoidCrossEntropy() if source.is_multi_label else SoftmaxCrossEntropy(label_smoothing=0.1),
        eval_every_steps=steps_per_epoch,
    )


def _sizes(info: WeightsInfo) -> tuple[ImageSizes, Preprocessing]:
    """Sizes of the images in training and evaluation, and how those of an evaluation are prepared."""
    name = next((name for name, config in VARIANTS.items() if _described(config) == _described(info.model)), None)
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
    is_as_published = known is not None and known.test == seen_as.image_size
    return known if known and is_as_published else ImageSizes(seen_as.image_size, seen_as.image_size), seen_as


def _described(config: ModelConfig) -> dict[str, object]:
    """The configuration of a network without what does not change its function."""
    return {name: value for name, value in to_json(config).items() if name not in FREE_FIELDS}


def _source(
    data: str, image: str, label: str, separator: str | None, split_column: str | None, eval_file: str | None
) -> SourceConfig:
    path = local_path("data", data)
    if path.suffix.lower() == ".csv":
        return CsvSource(
            file=data,
            image=image,
            label=label,
            separator=separator,
            allow_none=separator is not None,
            split_column=split_column,
            eval_file=eval_file,
        )
    require(path.is_dir(), "data", data, "give a folder of images, or a .csv file")
    is_split = (path / "train").is_dir()
    names = [name for name in ("val", "eval", "test") if is_split and (path / name).is_dir()]
    return FolderSource(root=data, train="train" if is_split else ".", eval=names[0] if names else "val")


def _count(source: SourceConfig, image_size: int) -> tuple[tuple[str, ...], int, int | None]:
    """Class names, number of images, and how many of them are to be held out; None: the source has a split for that."""
    images = source.open("train", image_size)
    if isinstance(source, CsvSource):
        has_split = source.split_column is not None or source.eval_file is not None
    else:
        assert isinstance(source, FolderSource)
        has_split = source.folder("eval").is_dir() and source.train != "."
    return images.class_names, len(images), None if has_split else max(1, len(images) // 10)
