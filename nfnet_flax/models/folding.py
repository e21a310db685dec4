"""The inference form of a normalizer-free network."""

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import ConfigError, require
from nfnet_flax.models import layers
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.layers import WSConv
from nfnet_flax.models.standardization import standardize


def fold(model: Classifier) -> Classifier:
    """A copy for inference, in evaluation mode, with plain convolutions.

    Kernels are standardized once, multiplied by their gains, the activations' gammas and the blocks' constants, and
    stored in the type that the network computes in. Logits, features and signal statistics equal the original's up to
    rounding. The copy cannot be trained.

    Raises:
      ConfigError: it is not a network, belongs to a family that cannot be folded, or is already folded.
    """
    require(isinstance(model, Classifier), "model", model, "give a network, such as nfnet_flax.create_model makes")
    if not model.is_foldable:
        raise ConfigError(f"fold: {type(model).__name__} cannot be folded; normalizer-free networks can")
    if model.is_folded:
        raise ConfigError("fold: the network is folded already; give it as create_model makes it")
    folded: Classifier = nnx.clone(model)
    folded.eval()
    _, gamma = layers.ACTIVATIONS[model.stages[0][0].activation]
    factors: dict[int, float] = {}
    for stage, specs in zip(folded.stages, folded.specs, strict=True):
        for block, spec in zip(stage, specs, strict=True):
            for _, module in nnx.iter_modules(block):
                factors[id(module)] = gamma
            factors[id(block.conv0)] = gamma * spec.beta
            if block.has_projection:
                factors[id(block.conv_shortcut)] = gamma * spec.beta
            if block.has_skip_gain:
                block.skip_gain = nnx.Param(block.skip_gain[...] * block.alpha)
                block.alpha = 1.0
            block.is_folded = True
    for conv in folded.convolutions_after_scaling():
        factors[id(conv)] = gamma
    folded.is_folded = True
    for _, module in nnx.iter_modules(folded):
        if isinstance(module, WSConv):
            _fold_convolution(module, factors.get(id(module), 1.0))
    return folded


def _fold_convolution(conv: WSConv, factor: float) -> None:
    dtype = layers.DTYPES[conv.compute_dtype]

    @jax.jit
    def plain(kernel: jax.Array, gain: jax.Array) -> jax.Array:
        kernel = kernel.astype(layers.statistics_dtype(dtype))
        return (standardize(kernel, gain, conv.standardization) * factor).astype(dtype)

    conv.kernel = nnx.Param(plain(conv.kernel[...], conv.gain[...]))
    conv.bias = nnx.Param(conv.bias[...].astype(dtype))
    conv.gain = nnx.Param(jnp.ones((0,), jnp.float32))  # the kernel is already multiplied by it
    conv.is_prepared = True
