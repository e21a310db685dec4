"""NF-ResNet-50 to 600 on ImageNet with the settings of the published code's ResNet experiment.

Paper: Brock et al. 2021, arXiv 2101.08692 (no dropout, no gradient clipping).
Data: python tools/prepare_imagenet.py --help; the recipe reads what `--out data/imagenet` wrote. With data=FOLDER it
  reads another folder, also of Parquet or tar files.
Command: nfnet train recipes/nf_resnet_imagenet.py:variant=101 --workdir runs/nf101
         nfnet train recipes/nf_resnet_imagenet.py:variant=101 --debug --workdir runs/debug
Published top-1: see the paper's tables; the numbers were not measured here, so they are not repeated.

recipes/resnet_imagenet.py is the same with BatchNorm. With larger batches NF-ResNets need gradient clipping:
--optim.clipping AGC (arXiv 2102.06171).
"""

from nfnet_flax.config import require
from nfnet_flax.imagenet import RESNET_OPTIM, imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, model_config
from nfnet_flax.recipe import Recipe

VARIANTS = ("50", "101", "152", "200", "288", "600")
"""Published depths of the network."""


def recipe(variant: str = "50", data: str = "data/imagenet") -> Recipe:
    """The run of one depth."""
    require(variant in VARIANTS, "variant", variant, f"known are {', '.join(VARIANTS)}")
    name = f"nf_resnet{variant}"
    return imagenet_recipe(
        name,
        model_config(name, drop_rate=0.0, compute_dtype="float32"),
        IMAGE_SIZES[name],
        RESNET_OPTIM,
        num_epochs=90.0,
        batch_size=1024,
        images_per_part=16,  # up to 64 devices
        data=data,
    )
