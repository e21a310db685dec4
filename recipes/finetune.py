"""Fine-tunes a network, whose weights are given, on images of your own: a folder, a CSV file, Parquet or tar files.

Paper: Brock et al. 2021, arXiv 2102.06171 (AGC; section 6 fine-tunes NFNets); Clark et al. 2020, arXiv 2003.10555 (the
  argument layer_decay: a learning rate that decreases from the head to the stem).
Data: a folder with one folder of images per class, or with `train/` and `val/` of these; or a `.csv` file, see
  `CsvSource`; or a folder of Parquet or tar files, see `ParquetSource` and `WebDatasetSource`. Without a held-out
  split, a tenth of the images is held out.
Command: nfnet train recipes/finetune.py:weights=weights.safetensors,data=photos --workdir runs/photos
Others: weights=timm/eca_nfnet_l0.ra2_in1k (a model hub), weights=runs/other (a run); data=photos.csv,label=species;
  'separator=;' (with quotes in a shell) for several classes per image. Any option of a recipe may follow, such as
  --num-epochs 50.

Network, image sizes and normalization are those of the weights, class names those of the data. The new head starts at
zero and is trained alone at first. One part per batch is the fastest way on one device, and needs one: to use several,
give num_parts=8, which also gives other last bits.
"""

import dataclasses
import math
from pathlib import Path

from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.finetuning import data_config, given_images, sizes_of
from nfnet_flax.models import ExecutionConfig
from nfnet_flax.objectives import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nfnet_flax.optim import AGC, SGD, OptimConfig, ParamGroup
from nfnet_flax.recipe import CheckpointConfig, Recipe
from nfnet_flax.training.reading import weights_of


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
    layer_decay: float = 1.0,
    num_parts: int = 1,
    flip: bool = True,
) -> Recipe:
    """The run.

    Args:
      weights: a weight file, the folder of a run, a folder with timm's `config.json`, or a name in a model hub.
      data: folder of images, or of Parquet or tar files, or a `.csv` file.
      image: for a CSV file, the column with the names of the image files; for Parquet files, with the images.
      label: the column with the class.
      separator: for a CSV file, as the following: text between the classes of an image; None: each has one class.
      split_column: column that contains `train` or `val`; None: there is none.
      eval_file: CSV file of the held-out images; None: there is none.
      batch_size: number of images of one update.
      num_epochs: length of the run, in epochs.
      head_epochs: number of epochs in which only the head is trained.
      layer_decay: factor on the learning rate for each block between a layer and the head, such as 0.9.
      num_parts: number of parts of a batch, a power of two: the largest number of devices.
      flip: whether training images are mirrored at random; not for digits or letters.
    """
    info, _ = weights_of(weights)
    sizes, seen_as = sizes_of(info)
    images = given_images(
        data, image=image, label=label, separator=separator, split_column=split_column, eval_file=eval_file
    )
    settings = data_config(images, seen_as, train_size=sizes.train, batch_size=batch_size)
    steps_per_epoch = math.ceil(images.num_train / batch_size)
    is_multi_label = images.source.is_multi_label
    best = "mean_average_precision" if is_multi_label else "top1"
    return Recipe(
        name=f"finetune_{Path(data).stem or 'images'}",
        model=info.model,
        num_classes=len(images.class_names),
        data=dataclasses.replace(settings, augment=CropAugment(min_area=0.35, flip=flip)),
        optim=OptimConfig(
            # On the digits AdamW is no better at this batch size (docs/fine_tuning.md).
            method=SGD(),
            clipping=AGC(ratio=0.05),
            learning_rate_per_256=0.4,
            weight_decay=2e-5,
            warmup_epochs=min(1.0, num_epochs / 10),
            layer_decay=layer_decay,
            trained_from_epoch=(ParamGroup("head.*", 0.0), ParamGroup("*", min(head_epochs, num_epochs / 4))),
            ema_decay=0.99,
        ),
        execution=ExecutionConfig(num_microbatches=num_parts),
        checkpoint=CheckpointConfig(every_steps=steps_per_epoch, best_metric=f"eval_ema/{best}"),
        init_from=weights,
        init_to_zero=("head.*",),
        num_epochs=num_epochs,
        objective=SigmoidCrossEntropy() if is_multi_label else SoftmaxCrossEntropy(label_smoothing=0.1),
        eval_every_steps=steps_per_epoch,
    )
