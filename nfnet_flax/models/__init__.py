"""Networks of the NFNet papers as Flax NNX modules."""

from nfnet_flax.models.layers import example_keys
from nfnet_flax.models.nfnet import NFNet, NFNetConfig
from nfnet_flax.models.registry import ModelConfig, build_model, create_model, list_models, model_config

__all__ = [
    "ModelConfig",
    "NFNet",
    "NFNetConfig",
    "build_model",
    "create_model",
    "example_keys",
    "list_models",
    "model_config",
]
