"""NF-ResNet-50 to 600 on ImageNet with the settings of the published code's ResNet experiment.

Paper: Brock et al. 2021, arXiv 2101.08692 (no dropout, no gradient clipping).
Data: python tools/prepare_imagenet.py --help; the paths below are those of `--out data/imagenet`.
Command: nfnet train recipes/nf_resnet_imagenet.py:variant=101 --workdir runs/nf101
         nfnet train recipes/nf_resnet_imagenet.py:variant=101 --debug --workdir runs/debug
Published top-1: in the paper's tables; none is repeated here, as none was checked or reached here.

recipes/resnet_imagenet.py is the same with BatchNorm. At batches larger than this one NF-ResNets want clipping:
--optim.clipping AGC (arXiv 2102.06171).
"""

from nfnet_flax.config import require
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import ArrayRecordSource
from nfnet_flax.models import ExecutionConfig, model_config
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import SGD, Cosine, OptimConfig
from nfnet_flax.recipe import CheckpointConfig, Recipe

VARIANTS = ("50", "101", "152", "200", "288", "600")
"""Depths."""


def recipe(variant: str = "50") -> Recipe:
    """The run of one depth."""
    require(variant in VARIANTS, "variant", variant, f"known are {', '.join(VARIANTS)}")
    model = model_config(f"nf_resnet{variant}", drop_rate=0.0, compute_dtype="float32")
    return Recipe(
        name=f"nf_resnet{variant}",
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
            batch_size=1024,
            eval_batch_size=1024,
            augment=CropAugment(),
            randaugment=None,
            mixing=None,
            num_threads=8,  # on each host: give it one for each core
            prefetch_batches=8,
        ),
        optim=OptimConfig(
            learning_rate_per_256=0.1,
            warmup_epochs=5.0,
            method=SGD(momentum=0.9, nesterov=True),
            clipping=None,
            schedule=Cosine(),
            weight_decay=1e-4,
            ema_decay=0.9999,
        ),
        execution=ExecutionConfig(num_microbatches=64),  # parts of 16 images: up to 64 devices
        checkpoint=CheckpointConfig(every_steps=2000),
        num_epochs=90.0,
        objective=SoftmaxCrossEntropy(label_smoothing=0.1),
        log_every_steps=100,
        eval_every_steps=5000,
    )
