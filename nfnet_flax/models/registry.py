"""Names of networks: one table, and the functions that read it."""

import dataclasses
from typing import Any

from flax import nnx

from nfnet_flax.config import ConfigError, unknown_name
from nfnet_flax.models import nfnet

ModelConfig = nfnet.NFNetConfig
VARIANTS: dict[str, ModelConfig] = dict(nfnet.VARIANTS)


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(VARIANTS)


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """Configuration of a named network, with fields replaced.

    Raises:
      ConfigError: the name or a field is unknown, or a value is invalid.
    """
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    config = VARIANTS[name]
    fields = {field.name for field in dataclasses.fields(config)}
    for field in overrides:
        if field not in fields:
            raise unknown_name(f"field of {type(config).__name__}", field, fields)
    return dataclasses.replace(config, **overrides)


def build_model(config: ModelConfig, *, num_classes: int, rngs: nnx.Rngs) -> nfnet.NFNet:
    """The network of a configuration, with random parameters, in training mode."""
    if num_classes < 1:
        raise ConfigError(f"num_classes = {num_classes}: must be at least 1")
    return nfnet.NFNet(config, num_classes=num_classes, rngs=rngs)


def create_model(name: str, *, num_classes: int = 1000, rngs: nnx.Rngs, **overrides: Any) -> nfnet.NFNet:
    """A named network with random parameters, in training mode.

    Args:
      name: one of `list_models()`.
      num_classes: outputs of the head.
      rngs: source of the initial parameters.
      **overrides: fields of the network's configuration, such as `drop_rate=0.0`.

    Raises:
      ConfigError: the name or a field is unknown, or a value is invalid.
    """
    return build_model(model_config(name, **overrides), num_classes=num_classes, rngs=rngs)
