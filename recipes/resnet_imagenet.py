"""ResNet v2 with BatchNorm on ImageNet, the baseline of the NF-ResNets, and SE-ResNeXt-D-50, from which NFNet descends.

Paper: He et al. 2016, arXiv 1603.05027 (network); the settings are those of the code published with arXiv 2101.08692.
Data: python tools/prepare_imagenet.py --help; the paths below are those of `--out data/imagenet`.
Command: nfnet train recipes/resnet_imagenet.py:variant=101 --workdir runs/resnet101
         nfnet train recipes/resnet_imagenet.py:variant=101 --debug --workdir runs/debug
Published top-1: arXiv 2101.08692 compares these networks with the NF-ResNets in its tables; none is repeated here, as
none was checked or reached here.

Batch statistics are those of each microbatch on each device: the published experiment had 1024 images on its devices
together, and did not share statistics among them.
"""

from nfnet_flax.config import require
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import ArrayRecordSource
from nfnet_flax.models import ExecutionConfig, model_config
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import SGD, Cosine, OptimConfig
from nfnet_flax.recipe import CheckpointConfig, Recipe

NAMES = {
    "50": "resnet50",
    "101": "resnet101",
    "152": "resnet152",
    "200": "resnet200",
    "se_resnext_d50": "se_resnext_d50",
}


def recipe(variant: str = "50") -> Recipe:
    """The run of one depth, or of `se_resnext_d50`."""
    require(variant in NAMES, "variant", variant, f"known are {', '.join(NAMES)}")
    model = model_config(NAMES[variant], compute_dtype="float32")
    return Recipe(
        name=NAMES[variant],
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
        execution=ExecutionConfig(
            num_microbatches=32
        ),  # parts of 32 images, over which BatchNorm averages: up to 32 devices
        checkpoint=CheckpointConfig(every_steps=2000),
        num_epochs=90.0,
        objective=SoftmaxCrossEntropy(label_smoothing=0.1),
        log_every_steps=100,
        eval_every_steps=5000,
    )
