"""ResNet v2 with BatchNorm on ImageNet, the baseline of the NF-ResNets, and SE-ResNeXt-D-50, on which NFNet is based.

Paper: He et al. 2016, arXiv 1603.05027 (network); the settings are those of the code published with arXiv 2101.08692.
Data: python tools/prepare_imagenet.py --help; the recipe reads what `--out data/imagenet` wrote. With data=FOLDER it
  reads another folder, also of Parquet or tar files.
Command: nfnet train recipes/resnet_imagenet.py:variant=101 --workdir runs/resnet101
         nfnet train recipes/resnet_imagenet.py:variant=101 --debug --workdir runs/debug
Published top-1: arXiv 2101.08692 compares these networks with the NF-ResNets in its tables; the numbers were not
measured here, so they are not repeated.

Batch statistics are computed for each microbatch on each device: the published experiment had 1024 images on all
devices together, and its devices did not share statistics.
"""

from nfnet_flax.config import require
from nfnet_flax.imagenet import RESNET_OPTIM, imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, model_config
from nfnet_flax.recipe import Recipe

NAMES = {
    "50": "resnet50",
    "101": "resnet101",
    "152": "resnet152",
    "200": "resnet200",
    "se_resnext_d50": "se_resnext_d50",
}


def recipe(variant: str = "50", data: str = "data/imagenet") -> Recipe:
    """The run of one depth, or of `se_resnext_d50`."""
    require(variant in NAMES, "variant", variant, f"known are {', '.join(NAMES)}")
    name = NAMES[variant]
    return imagenet_recipe(
        name,
        model_config(name, compute_dtype="float32"),
        IMAGE_SIZES[name],
        RESNET_OPTIM,
        num_epochs=90.0,
        batch_size=1024,
        images_per_part=32,  # up to 32 devices
        data=data,
    )
