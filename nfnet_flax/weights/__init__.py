"""Weights in and out: the published Haiku trees and files, timm's safetensors, and our own portable files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.models import Classifier, build_model, model_config
from nfnet_flax.models.params import merge, split, update
from nfnet_flax.weights.haiku import from_haiku, to_haiku
from nfnet_flax.weights.pickles import load_haiku_file
from nfnet_flax.weights.portable import load_weights, read_weights, save_weights, stored_arrays
from nfnet_flax.weights.timm import TIMM_FORM, from_timm, to_timm

__all__ = [
    "TIMM_FORM",
    "create_model",
    "from_haiku",
    "from_timm",
    "load_haiku_file",
    "load_weights",
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
    weights: str | Path | None = None,
    skip: Sequence[str] = (),
    **overrides: Any,
) -> Classifier:
    """A named network, in training mode.

    Args:
      name: one of `list_models()`.
      num_classes: outputs of the head.
      rngs: source of the initial parameters.
      weights: a `.safetensors` file that `nfnet convert` or `save_weights` wrote; None: random parameters.
      skip: shell-style patterns of parameters that stay random, such as `head.*` for a head of another size.
      **overrides: fields of the network's configuration, such as `drop_rate=0.0`.

    Raises:
      ConfigError: the name or a field is unknown, a value is invalid, or the weights do not fit.
    """
    config = model_config(name, **overrides)
    if weights is None:
        return build_model(config, num_classes=num_classes, rngs=rngs)
    abstract = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    arrays = stored_arrays(weights, abstract, skip=skip)
    if not skip:  # nothing needs to be drawn
        return merge(split(abstract)[0], jax.tree.map(jnp.asarray, arrays), {})
    model = build_model(config, num_classes=num_classes, rngs=rngs)
    update(model, dict(arrays))
    return model
