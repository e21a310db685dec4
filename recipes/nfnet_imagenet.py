"""NFNet-F0 to F7 (and F0+ to F7+, wider) on ImageNet, as published.

Paper: Brock et al. 2021, arXiv 2102.06171 (table 1: networks, section 4: settings, table 3: results).
Data: python tools/prepare_imagenet.py --help; the recipe reads what `--out data/imagenet` wrote. With data=FOLDER it
  reads another folder, also of Parquet or tar files.
Command: nfnet train recipes/nfnet_imagenet.py:variant=f1 --workdir runs/f1
         nfnet train recipes/nfnet_imagenet.py:variant=f1 --debug --workdir runs/debug
While tuning: --data.num-held-out 10000 leaves 10,000 training images out of training and evaluates on them, as the
authors did.

Published top-1 (at the test resolution), and hours of one TPUv3 core for 360 epochs, computed from the published time
of a training step with 32 images per core (input and evaluation not counted). None of it was measured here.

  f0     f1     f2     f3     f4     f5     f6
  83.6%  84.7%  85.1%  85.7%  85.9%  86.0%  86.5% (with SAM, as here)
  290    630    1180   2130   4140   5600   11100 (with SAM)

Two differences from the published code: each image of a batch is mixed with another one of the same batch, not with one
that is read for this purpose; and two errors of RandAugment's contrast and solarize are corrected (see
nfnet_flax/data/randaugment.py).
"""

from nfnet_flax.config import require
from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
from nfnet_flax.imagenet import imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, model_config
from nfnet_flax.optim import AGC, SGD, Cosine, OptimConfig, SAMConfig
from nfnet_flax.recipe import Recipe

MAGNITUDES = {"f0": 5, "f1": 10, "f2": 10, "f3": 15, "f4": 15, "f5": 15, "f6": 15, "f7": 15}
"""Magnitude of RandAugment for each network."""


def recipe(variant: str = "f0", data: str = "data/imagenet") -> Recipe:
    """The run of `f0` ... `f7` or `f0+` ... `f7+`."""
    level = variant.removesuffix("+")
    require(level in MAGNITUDES, "variant", variant, f"known are {', '.join(MAGNITUDES)}, and each with a +")
    optim = OptimConfig(
        learning_rate_per_256=0.1,
        warmup_epochs=5.0,
        method=SGD(momentum=0.9, nesterov=True),
        clipping=AGC(ratio=0.01),
        schedule=Cosine(),
        weight_decay=2e-5,
        ema_decay=0.99999,
        sam=SAMConfig(rho=0.05, fraction=0.2) if level == "f6" else None,
    )
    name = f"nfnet_{variant}"
    return imagenet_recipe(
        name,
        model_config(name, compute_dtype="bfloat16"),
        IMAGE_SIZES[name],
        optim,
        num_epochs=360.0,
        batch_size=4096,
        images_per_part=16,  # up to 256 devices
        data=data,
        randaugment=RandAugmentConfig(num_layers=4, magnitude=MAGNITUDES[level], order="after_mixing"),
        mixing=MixingConfig(mixup_alpha=0.2, cutmix=True),
        checkpoint_every_steps=1000,
    )
