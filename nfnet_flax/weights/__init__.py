"""Reading and writing weights: the published Haiku trees and files, timm's safetensors, and our own portable files."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.models import Classifier, ModelConfig, build_model, model_config
from nfnet_flax.models.params import merge, split, update
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.haiku import from_haiku, to_haiku
from nfnet_flax.weights.pickles import load_haiku_file
from nfnet_flax.weights.portable import (
    Preprocessing,
    WeightsInfo,
    fitting_arrays,
    load_weights,
    read_weights,
    save_weights,
)
from nfnet_flax.weights.reference import open_weights
from nfnet_flax.weights.timm import TIMM_FORM, from_timm, to_timm

__all__ = [
    "TIMM_FORM",
    "Preprocessing",
    "WeightsInfo",
    "create_model",
    "from_haiku",
    "from_timm",
    "load_haiku_file",
    "load_model",
    "load_weights",
    "open_weights",
    "read_weights",
    "save_weights",
    "to_haiku",
    "to_timm",
]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    rngs: nnx.Rngs,
    weights: str | os.PathLike[str] | None = None,
    skip: Sequence[str] = (),
    **overrides: Any,
) -> Classifier:
    """A named network, in training mode.

    Args:
      name: name of the network, one of `list_models()`.
      num_classes: number of outputs of the head; 0: there is no head, and the network returns its features.
      rngs: source of the initial parameters.
      weights: a `.safetensors` file that `nfnet convert` or `save_weights` wrote, or other weights that `open_weights`
        takes, such as `timm/eca_nfnet_l0.ra2_in1k` in a model hub; None: random parameters.
      skip: shell-style patterns of parameters that stay random, such as `head.*` for a head of another size.
      **overrides: fields of the network's configuration, such as `drop_rate=0.0`, `in_channels=1` or
        `global_pool="max"`.

    Raises:
      ConfigError: the name or a field is unknown, a value is invalid, or the weights do not fit.
      HubUnreachable: the model hub cannot be reached.
    """
    config = model_config(name, **overrides)
    if weights is None:
        return build_model(config, num_classes=num_classes, rngs=rngs)
    abstract = _abstract(config, num_classes)
    info, stored = open_weights(weights)
    arrays = fitting_arrays(f"weights {str(weights)!r}", info, stored, abstract, skip)
    if not skip:  # no random parameters are needed
        return _with_arrays(abstract, arrays)
    model = build_model(config, num_classes=num_classes, rngs=rngs)
    update(model, dict(arrays))
    return model


def load_model(path: str | os.PathLike[str]) -> Classifier:
    """The network that a weight file holds, whatever its configuration, in evaluation mode.

    Args:
      path: a `.safetensors` file that `nfnet convert` or `save_weights` wrote, or other weights that `open_weights`
        takes, which also returns their description, such as class names and preprocessing if they are known.

    Raises:
      ConfigError: the file cannot be read, is damaged, or its arrays do not fit its own configuration.
      HubUnreachable: the model hub cannot be reached.
    """
    info, arrays = open_weights(path)
    return network_of(f"weights {str(path)!r}", info, arrays)


def network_of(source: str, info: WeightsInfo, arrays: HostArrays) -> Classifier:
    """A network with given arrays, in evaluation mode.

    Args:
      source: description of where the arrays come from, for the message of an error.
      info: description of the weights.
      arrays: our name -> array.

    Raises:
      ConfigError: the arrays do not fit.
    """
    abstract = _abstract(info.model, info.num_classes)
    model = _with_arrays(abstract, fitting_arrays(source, info, arrays, abstract))
    model.eval()
    return model


def _abstract(config: ModelConfig, num_classes: int) -> Classifier:
    """A network without values: its arrays are only shapes and types."""
    model: Classifier = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    return model


def _with_arrays(abstract: Classifier, arrays: HostArrays) -> Classifier:
    model: Classifier = merge(split(abstract)[0], jax.tree.map(jnp.asarray, arrays), {})
    return model
