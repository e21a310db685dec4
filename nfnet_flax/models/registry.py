"""The table of named networks of all families, and the function that builds a network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError, require, unknown_name
from nfnet_flax.models import efficientnet, nf_regnet, nf_resnet, nfnet, resnet, timm_variants
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.config import ImageSizes, ModelConfig
from nfnet_flax.models.efficientnet import EfficientNetConfig
from nfnet_flax.models.nf_regnet import NFRegNetConfig
from nfnet_flax.models.nf_resnet import NFResNetConfig
from nfnet_flax.models.nfnet import NFNetConfig
from nfnet_flax.models.params import check_names
from nfnet_flax.models.resnet import ResNetConfig
from nfnet_flax.models.timm_nfnet import TimmNFNetConfig
from nfnet_flax.open_config import declare_kinds

declare_kinds(
    ModelConfig, NFNetConfig, NFResNetConfig, NFRegNetConfig, TimmNFNetConfig, ResNetConfig, EfficientNetConfig
)
VARIANTS: Mapping[str, ModelConfig] = {
    **nfnet.VARIANTS,
    **nf_resnet.VARIANTS,
    **nf_regnet.VARIANTS,
    **timm_variants.VARIANTS,
    **resnet.VARIANTS,
    **efficientnet.VARIANTS,
}

IMAGE_SIZES: Mapping[str, ImageSizes] = {
    **nfnet.IMAGE_SIZES,
    **nf_resnet.IMAGE_SIZES,
    **nf_regnet.IMAGE_SIZES,
    **timm_variants.IMAGE_SIZES,
    **resnet.IMAGE_SIZES,
    **efficientnet.IMAGE_SIZES,
}
"""Name of a network -> sizes of the images that it was published with."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What a paper reports for a network on ImageNet with 1000 classes, at the test size."""

    top1_percent: float
    top5_percent: float | None
    """None: not on record in this package."""
    source: str


_NFNETS = "arXiv 2102.06171, table 3"
_EFFICIENTNETS = "arXiv 1905.11946, table 2"
PUBLISHED: Mapping[str, Published] = {
    "nfnet_f0": Published(83.6, 96.8, _NFNETS),
    "nfnet_f1": Published(84.7, 97.1, _NFNETS),
    "nfnet_f2": Published(85.1, 97.3, _NFNETS),
    "nfnet_f3": Published(85.7, 97.5, _NFNETS),
    "nfnet_f4": Published(85.9, 97.6, _NFNETS),
    "nfnet_f5": Published(86.0, 97.6, _NFNETS),
    "nfnet_f6": Published(86.5, 97.9, f"{_NFNETS}, with SAM"),
    "efficientnet_b0": Published(77.1, None, _EFFICIENTNETS),
    "efficientnet_b1": Published(79.1, None, _EFFICIENTNETS),
    "efficientnet_b2": Published(80.1, None, _EFFICIENTNETS),
    "efficientnet_b3": Published(81.6, None, _EFFICIENTNETS),
    "efficientnet_b4": Published(82.9, None, _EFFICIENTNETS),
    "efficientnet_b5": Published(83.6, None, _EFFICIENTNETS),
    "efficientnet_b6": Published(84.0, None, _EFFICIENTNETS),
    "efficientnet_b7": Published(84.3, None, _EFFICIENTNETS),
}
"""Name of a network -> its results, if a paper gives them for exactly this network."""
PUBLISHED_TOP1_PERCENT: Mapping[str, float] = {name: found.top1_percent for name, found in PUBLISHED.items()}
"""Name of a network -> ImageNet top-1 accuracy."""


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(VARIANTS)


def name_of(config: ModelConfig) -> str | None:
    """Name of the network that a configuration describes, whatever type it computes in; None: it has none."""
    return next((name for name, named in VARIANTS.items() if _is_same(named, config)), None)


def _is_same(named: ModelConfig, config: ModelConfig) -> bool:
    return type(named) is type(config) and dataclasses.replace(named, compute_dtype=config.compute_dtype) == config


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """Configuration of a named network, with fields replaced.

    Raises:
      ConfigError: the name or a field is unknown, or a value is invalid.
    """
    require(isinstance(name, str), "model", name, "give the name of a network; list_models() has them")
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS, listed_by="nfnet models")
    config = VARIANTS[name]
    fields = {field.name for field in dataclasses.fields(config)}
    for field in overrides:
        if field not in fields:
            raise unknown_name(f"field of {type(config).__name__}", field, fields)
    return dataclasses.replace(config, **overrides)


def build_model(config: ModelConfig, *, num_classes: int, rngs: nnx.Rngs) -> Classifier:
    """The network of a configuration, with random parameters, in training mode.

    Args:
      config: configuration of any family, which may be a user's own.
      num_classes: number of outputs of the head; 0: there is no head, and the network returns its features.
      rngs: source of the initial parameters.

    Raises:
      ConfigError: a value is invalid, or a user's own family makes a network that the package cannot train.
    """
    is_count = isinstance(num_classes, int | np.integer) and not isinstance(num_classes, bool)
    remedy = "must be an integer and at least 1, or 0 for a network without a head"
    require(is_count and num_classes >= 0, "num_classes", num_classes, remedy)
    require(isinstance(rngs, nnx.Rngs), "rngs", rngs, "give a source of random numbers, such as flax.nnx.Rngs(0)")
    remedy = "give a network's configuration; model_config(name) makes one"
    require(isinstance(config, ModelConfig), "config", config, remedy)
    if config.compute_dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ConfigError("model.compute_dtype = 'float64': call jax.enable_x64(True) first, or use float32")
    model = config.build(num_classes, rngs)
    _check_built(config, num_classes, model)
    check_names(model)
    return model


def _check_built(config: ModelConfig, num_classes: int, model: object) -> None:
    """Raises `ConfigError` unless a configuration has built a complete network."""
    made_by = f"{type(config).__name__}.build"
    if not isinstance(model, Classifier):
        remedy = "return a network that derives from Classifier (nfnet_flax.models)"
        raise ConfigError(f"{made_by} returned {type(model).__name__}: {remedy}")
    calls = {
        "config": "set self.config",
        "stages": "call self._add_blocks",
        ("head" if num_classes > 0 else "num_features"): "call self._add_head",
    }
    if missing := [call for name, call in calls.items() if name not in vars(model)]:
        raise ConfigError(f"{made_by}: {type(model).__name__}.__init__ must {' and '.join(missing)}")
    require(model.config == config, f"{made_by}: config", model.config, "must be the configuration itself")
    require(model.num_classes == num_classes, f"{made_by}: num_classes", model.num_classes, f"must be {num_classes}")
    if not _has_blocks(model):
        raise ConfigError(
            f"{made_by}: {type(model).__name__}.stages must be lists of blocks (nnx.Module), one for each BlockSpec: "
            "self._add_blocks makes them"
        )


def _has_blocks(model: Classifier) -> bool:
    """Whether there is a list of blocks for each row of specs, with the same number of blocks."""
    stages = model.stages
    if not isinstance(stages, nnx.List) or not all(isinstance(stage, nnx.List) for stage in stages):
        return False
    is_whole = [len(stage) for stage in stages] == [len(row) for row in model.specs]
    return is_whole and all(isinstance(block, nnx.Module) for stage in stages for block in stage)
