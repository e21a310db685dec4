"""EfficientNet-B0 to B7 on ImageNet: the optimizer as published, RandAugment in place of AutoAugment.

Paper: Tan and Le 2019, arXiv 1905.11946 (section 5.2; table 2: results).
Data: python tools/prepare_imagenet.py --help; the recipe reads what `--out data/imagenet` wrote. With data=FOLDER it
  reads another folder, also of Parquet or tar files.
Command: nfnet train recipes/efficientnet_imagenet.py:variant=b1 --workdir runs/b1
         nfnet train recipes/efficientnet_imagenet.py:variant=b1 --debug --workdir runs/debug

Published top-1 (with AutoAugment). None of it was measured here.

  b0     b1     b2     b3     b4     b5     b6     b7
  77.1%  79.1%  80.1%  81.6%  82.9%  83.6%  84.0%  84.3%

AutoAugment's learnt policies are not in this package: RandAugment with 2 layers of magnitude 10 replaces them, which is
our choice and not a published one. The published learning rate, 0.256, is for a batch of 4096. Test images are resized
to a height and width of 32 px more than the crop.
"""

from nfnet_flax.config import require
from nfnet_flax.data.mixing_config import RandAugmentConfig
from nfnet_flax.imagenet import imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, model_config
from nfnet_flax.optim import ExponentialDecay, OptimConfig, ParamGroup, RMSProp
from nfnet_flax.recipe import Recipe

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")


def recipe(variant: str = "b0", data: str = "data/imagenet") -> Recipe:
    """The run of `b0` ... `b7`."""
    require(variant in VARIANTS, "variant", variant, f"known are {', '.join(VARIANTS)}")
    optim = OptimConfig(
        learning_rate_per_256=0.016,
        warmup_epochs=5.0,
        method=RMSProp(decay=0.9, eps=1e-3, momentum=0.9),
        clipping=None,
        schedule=ExponentialDecay(factor=0.97, every_epochs=2.4),
        weight_decay=1e-5,
        weight_decay_groups=(ParamGroup("*norm.*", 0.0), ParamGroup("*", 1.0)),
        ema_decay=0.9999,
    )
    name = f"efficientnet_{variant}"
    return imagenet_recipe(
        name,
        model_config(name, compute_dtype="bfloat16"),
        IMAGE_SIZES[name],
        optim,
        num_epochs=350.0,
        batch_size=4096,
        images_per_part=32,  # up to 128 devices
        data=data,
        randaugment=RandAugmentConfig(num_layers=2, magnitude=10),
        checkpoint_every_steps=1000,
    )
