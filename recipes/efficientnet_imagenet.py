"""EfficientNet-B0 to B7 on ImageNet: the optimizer as published, RandAugment in place of AutoAugment.

Paper: Tan and Le 2019, arXiv 1905.11946 (section 5.2; table 2: results).
Data: python tools/prepare_imagenet.py --help; the paths below are those of `--out data/imagenet`.
Command: nfnet train recipes/efficientnet_imagenet.py:variant=b1 --workdir runs/b1
         nfnet train recipes/efficientnet_imagenet.py:variant=b1 --debug --workdir runs/debug

Published top-1 (with AutoAugment). None of it was measured here.

  b0     b1     b2     b3     b4     b5     b6     b7
  77.1%  79.1%  80.1%  81.6%  82.9%  83.6%  84.0%  84.3%

AutoAugment's learnt policies are not in this package: RandAugment with 2 layers of magnitude 10 stands for them, which
is our choice and not a published one. The published learning rate, 0.256, belongs to a batch of 4096. Test images are
resized to 32 px more than the crop on each side.
"""

from nfnet_flax.config import require
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.mixing_config import RandAugmentConfig
from nfnet_flax.data.source_config import ArrayRecordSource
from nfnet_flax.models import ExecutionConfig, model_config
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import ExponentialDecay, OptimConfig, ParamGroup, RMSProp
from nfnet_flax.recipe import CheckpointConfig, Recipe

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")


def recipe(variant: str = "b0") -> Recipe:
    """The run of `b0` ... `b7`."""
    require(variant in VARIANTS, "variant", variant, f"known are {', '.join(VARIANTS)}")
    model = model_config(f"efficientnet_{variant}", compute_dtype="bfloat16")
    return Recipe(
        name=f"efficientnet_{variant}",
        model=model,
        num_classes=1000,
        platform="accelerator",
        data=DataConfig(
            source=ArrayRecordSource(
                train=("data/imagenet/train-*.array_record",), eval=("data/imagenet/eval-*.array_record",)
            ),
            image_size=model.train_image_size,
            eval_image_size=model.test_image_size,
            eval_crop_margin=32,
            batch_size=4096,
            eval_batch_size=4096,
            augment=CropAugment(),
            randaugment=RandAugmentConfig(num_layers=2, magnitude=10),
            mixing=None,
            num_threads=8,  # on each host: give it one for each core
            prefetch_batches=8,
        ),
        optim=OptimConfig(
            learning_rate_per_256=0.016,
            warmup_epochs=5.0,
            method=RMSProp(decay=0.9, eps=1e-3, momentum=0.9),
            clipping=None,
            schedule=ExponentialDecay(factor=0.97, every_epochs=2.4),
            weight_decay=1e-5,
            weight_decay_groups=(ParamGroup("*norm.*", 0.0), ParamGroup("*", 1.0)),
            ema_decay=0.9999,
        ),
        execution=ExecutionConfig(
            num_microbatches=128
        ),  # parts of 32 images, over which BatchNorm averages: up to 128 devices
        checkpoint=CheckpointConfig(every_steps=1000),
        num_epochs=350.0,
        objective=SoftmaxCrossEntropy(label_smoothing=0.1),
        log_every_steps=100,
        eval_every_steps=5000,
    )
