"""What the recipes for ImageNet have in common; each recipe file gives only what differs."""

from nfnet_flax.config import require
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
from nfnet_flax.data.recognition import packed_source
from nfnet_flax.data.source_config import ArrayRecordSource, FolderSource, SourceConfig
from nfnet_flax.models import ExecutionConfig, ImageSizes, ModelConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import SGD, Cosine, OptimConfig
from nfnet_flax.paths import local_path
from nfnet_flax.recipe import CheckpointConfig, Recipe
from nfnet_flax.storage import bucket_url

RESNET_OPTIM = OptimConfig(
    learning_rate_per_256=0.1,
    warmup_epochs=5.0,
    method=SGD(momentum=0.9, nesterov=True),
    clipping=None,
    schedule=Cosine(),
    weight_decay=1e-4,
    ema_decay=0.9999,
)
"""Optimizer of the ResNets with and without BatchNorm, which train for 90 epochs."""


def imagenet_recipe(
    name: str,
    model: ModelConfig,
    image_sizes: ImageSizes,
    optim: OptimConfig,
    *,
    num_epochs: float,
    batch_size: int,
    images_per_part: int,
    data: str = "data/imagenet",
    randaugment: RandAugmentConfig | None = None,
    mixing: MixingConfig | None = None,
    checkpoint_every_steps: int = 2000,
    eval_every_steps: int = 5000,
) -> Recipe:
    """A run on ImageNet; change more of it by `dataclasses.replace`.

    Args:
      name: name of the run.
      model: the network.
      image_sizes: height and width of images; `IMAGE_SIZES` has the published ones of each named network.
      optim: the optimizer.
      num_epochs: length of the run, in epochs.
      batch_size: number of images of one update, over all devices.
      images_per_part: number of images in each of the equal parts into which the batch is cut. There can be at most as
        many devices as parts, and BatchNorm averages over a part.
      data: folder of the images: the ArrayRecord files that `tools/prepare_imagenet.py --out` wrote, also in a bucket
        (`gs://BUCKET/FOLDER`, `s3://`); or Parquet or tar files, see `ParquetSource` and `WebDatasetSource`; or
        `train/` and `val/` with a folder for each class.
      randaugment: RandAugment, in addition to random crops and flips.
      mixing: mixup and CutMix.
      checkpoint_every_steps: a checkpoint is written each time the step is a multiple of this.
      eval_every_steps: the held-out set is evaluated each time the step is a multiple of this.

    Raises:
      ConfigError: the batch cannot be cut into such parts, or a value is invalid.
    """
    require(batch_size % images_per_part == 0, "images_per_part", images_per_part, f"must divide batch {batch_size}")
    return Recipe(
        name=name,
        model=model,
        num_classes=1000,
        platform="accelerator",
        data=DataConfig(
            source=_source(data),
            image_size=image_sizes.train,
            eval_image_size=image_sizes.test,
            eval_crop_margin=32,
            batch_size=batch_size,
            eval_batch_size=batch_size,
            augment=CropAugment(),
            randaugment=randaugment,
            mixing=mixing,
            num_threads=8,  # on each host; best one for each core
            prefetch_batches=8,
        ),
        optim=optim,
        execution=ExecutionConfig(num_microbatches=batch_size // images_per_part),
        checkpoint=CheckpointConfig(every_steps=checkpoint_every_steps),
        num_epochs=num_epochs,
        objective=SoftmaxCrossEntropy(label_smoothing=0.1),
        log_every_steps=100,
        eval_every_steps=eval_every_steps,
    )


def _source(data: str) -> SourceConfig:
    """The source of the images in a folder; ArrayRecord files if it is in a bucket, where a recipe does not look, or if
    it is not there or holds nothing that is known."""
    if (url := bucket_url("data", data)) is not None:
        return ArrayRecordSource(train=(f"{url}/train-*.array_record",), eval=(f"{url}/eval-*.array_record",))
    path = local_path("data", data)
    if not any(path.glob("*.array_record")):
        if (found := packed_source(data, path, image="image", label="label")) is not None:
            return found[0]
        if (path / "train").is_dir():
            return FolderSource(root=data)
    return ArrayRecordSource(train=(f"{data}/train-*.array_record",), eval=(f"{data}/eval-*.array_record",))
