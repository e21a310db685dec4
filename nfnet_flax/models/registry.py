"""Names of networks: one table over all families, and the functions that read it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError, require, unknown_name
from nfnet_flax.models import efficientnet, nf_regnet, nf_resnet, nfnet, resnet
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.efficientnet import EfficientNet, EfficientNetConfig
from nfnet_flax.models.nf_regnet import NFRegNet, NFRegNetConfig
from nfnet_flax.models.nf_resnet import NFResNet, NFResNetConfig
from nfnet_flax.models.nfnet import NFNet, NFNetConfig
from nfnet_flax.models.resnet import ResNet, ResNetConfig

ModelConfig = NFNetConfig | NFResNetConfig | NFRegNetConfig | ResNetConfig | EfficientNetConfig
_FAMILIES: Mapping[type, type[Classifier]] = {
    NFNetConfig: NFNet,
    NFResNetConfig: NFResNet,
    NFRegNetConfig: NFRegNet,
    ResNetConfig: ResNet,
    EfficientNetConfig: EfficientNet,
}
VARIANTS: Mapping[str, ModelConfig] = {
    **nfnet.VARIANTS,
    **nf_resnet.VARIANTS,
    **nf_regnet.VARIANTS,
    **resnet.VARIANTS,
    **efficientnet.VARIANTS,
}

PUBLISHED_TOP1_PERCENT: Mapping[str, float] = {
    # arXiv 2102.06171, table 3; F6 with SAM.
    "nfnet_f0": 83.6,
    "nfnet_f1": 84.7,
    "nfnet_f2": 85.1,
    "nfnet_f3": 85.7,
    "nfnet_f4": 85.9,
    "nfnet_f5": 86.0,
    "nfnet_f6": 86.5,
    # arXiv 1905.11946, table 2.
    "efficientnet_b0": 77.1,
    "efficientnet_b1": 79.1,
    "efficientnet_b2": 80.1,
    "efficientnet_b3": 81.6,
    "efficientnet_b4": 82.9,
    "efficientnet_b5": 83.6,
    "efficientnet_b6": 84.0,
    "efficientnet_b7": 84.3,
}
"""ImageNet top-1 of the papers, where one is given for the very network."""


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(VARIANTS)


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """Configuration of a named network, with fields replaced.

    Raises:
      ConfigError: the name or a field is unknown, or a value is invalid.
    """
    require(isinstance(name, str), "model", name, "give the name of a network; list_models() has them")
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    config = VARIANTS[name]
    fields = {field.name for field in dataclasses.fields(config)}
    for field in overrides:
        if field not in fields:
            raise unknown_name(f"field of {type(config).__name__}", field, fields)
    return dataclasses.replace(config, **overrides)


def build_model(config: ModelConfig, *, num_classes: int, rngs: nnx.Rngs) -> Classifier:
    """The network of a configuration, with random parameters, in training mode.

    Args:
      config: of any family.
      num_classes: outputs of the head.
      rngs: source of the initial parameters.

    Raises:
      ConfigError: a value is invalid.
    """
    is_count = isinstance(num_classes, int | np.integer) and not isinstance(num_classes, bool)
    require(is_count and num_classes >= 1, "num_classes", num_classes, "must be an integer and at least 1")
    require(isinstance(rngs, nnx.Rngs), "rngs", rngs, "give a source of random numbers, such as flax.nnx.Rngs(0)")
    require(type(config) in _FAMILIES, "config", config, "give a network's configuration; model_config(name) makes one")
    if config.compute_dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ConfigError("model.compute_dtype = 'float64': call jax.enable_x64(True) first, or use float32")
    family: Any = _FAMILIES[type(config)]
    model: Classifier = family(config, num_classes=num_classes, rngs=rngs)
    return model
