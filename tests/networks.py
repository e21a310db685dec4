"""A small member of every family, and how tests compile and compare."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnet_flax.models import (
    Classifier,
    EfficientNetConfig,
    ModelConfig,
    NFRegNetConfig,
    NFResNetConfig,
    ResNetConfig,
    TimmNFNetConfig,
    build_model,
)
from nfnet_flax.models.params import merge, split
from nfnet_flax.weights.entries import shapes_of
from tests import golden

FAST_COMPILE: dict[str, str | bool] = {"xla_backend_optimization_level": 0}  # type: ignore[dict-item]

# A small member of every family.
SMALL: dict[str, ModelConfig] = {
    "nfnet": dataclasses.replace(golden.TINY, widths=(32, 64), depths=(1, 2), stochdepth_rate=0.1, drop_rate=0.1),
    "nf_resnet": NFResNetConfig(widths=(16, 32), depths=(1, 2), stem_width=8, se_ratio=0.25),
    "nf_regnet": NFRegNetConfig(widths=(24, 32), depths=(1, 2), drop_rate=0.1),
    "timm_nfnet": TimmNFNetConfig(
        widths=(32, 64),
        depths=(1, 2),
        stem_width=16,
        group_width=8,
        attention="efficient_channel",
        num_final=96,
        drop_rate=0.1,
    ),
    "resnet": ResNetConfig(widths=(16, 32), depths=(1, 2), stem_width=8, se_ratio=0.25),
    "se_resnext_d": ResNetConfig(
        widths=(16, 32),
        depths=(1, 1),
        stem_width=8,
        expansion=0.5,
        num_groups=4,
        se_ratio=0.25,
        is_d=True,
    ),
    "efficientnet": EfficientNetConfig(width_multiplier=0.25, depth_multiplier=0.3),
}


def relative(got: jax.Array, want: np.ndarray) -> float:
    """Largest difference as a share of the largest value."""
    return float(np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want)))


def lifelike(config: ModelConfig, num_classes: int) -> Classifier:
    """A network in evaluation mode whose arrays are not uniform, and whose signal stays of the order of one."""
    model = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    arrays = {}
    for name, (shape, dtype) in shapes_of(model).items():
        value = rng.standard_normal(shape)
        match name.rpartition(".")[2]:
            case "kernel":
                value /= np.sqrt(np.prod(shape[:-1]))
            case "gain":
                value = 1 + 0.2 * value
            case "skip_gain":
                value = 0.7 + 0.2 * value
            case "variance":
                value = rng.uniform(0.5, 2.0, shape)
            case "count":
                value = np.asarray(7)
            case _:
                value *= 0.2
        arrays[name] = jnp.asarray(value, dtype)
    made: Classifier = merge(split(model)[0], arrays, {})
    made.eval()
    return made
