"""NF-RegNet-B0 to B8 on ImageNet, as published: no gradient clipping, mixup and CutMix, no RandAugment.

Paper: Brock et al. 2021, arXiv 2101.08692; the settings are those of the code published with it.
Data: python tools/prepare_imagenet.py --help; the recipe reads what `--out data/imagenet` wrote. With data=FOLDER it
  reads another folder, also of Parquet or tar files.
Command: nfnet train recipes/nf_regnet_imagenet.py:variant=b1 --workdir runs/b1
         nfnet train recipes/nf_regnet_imagenet.py:variant=b1 --debug --workdir runs/debug
Published top-1: see the paper's tables; the numbers were not measured here, so they are not repeated.

Weight decay grows by 1e-5 with every level; the published code gives it for B0 to B5, and B6 to B8 continue the series.
Two differences from the published code: each image of a batch is mixed with another one of the same batch, not with one
that is read for this purpose; and evaluation resizes images to 32 px more than the crop without keeping the aspect
ratio, as NFNet's does, while the published code crops the middle first.
"""

from nfnet_flax.config import require
from nfnet_flax.data.mixing_config import MixingConfig
from nfnet_flax.imagenet import imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, model_config
from nfnet_flax.optim import SGD, Cosine, OptimConfig
from nfnet_flax.recipe import Recipe

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8")


def recipe(variant: str = "b0", data: str = "data/imagenet") -> Recipe:
    """The run of `b0` ... `b8`."""
    require(variant in VARIANTS, "variant", variant, f"known are {', '.join(VARIANTS)}")
    optim = OptimConfig(
        learning_rate_per_256=0.1,  # 0.4 at this batch size
        warmup_epochs=5.0,
        method=SGD(momentum=0.9, nesterov=True),
        clipping=None,
        schedule=Cosine(final_learning_rate=0.001),
        weight_decay=5e-5 + 1e-5 * VARIANTS.index(variant),
        ema_decay=0.99999,
    )
    name = f"nf_regnet_{variant}"
    return imagenet_recipe(
        name,
        model_config(name, stochdepth_rate=0.1, compute_dtype="float32"),
        IMAGE_SIZES[name],
        optim,
        num_epochs=360.0,
        batch_size=1024,
        images_per_part=16,  # up to 64 devices
        data=data,
        mixing=MixingConfig(mixup_alpha=0.2, cutmix=True),
        eval_every_steps=20000,
    )
