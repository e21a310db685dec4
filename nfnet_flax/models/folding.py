"""The inference forms of networks: standardization or BatchNorm is computed once, and is then part of kernels."""

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import ConfigError, require
from nfnet_flax.models import layers
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.layers import BatchNorm, WSConv
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


def fold_batch_norms(model: Classifier) -> Classifier:
    """A copy for inference, in evaluation mode, whose BatchNorms are a factor and an addend for each channel.

    A factor is part of the kernel where a convolution comes directly before. Logits and features equal the original's
    up to rounding. The copy cannot be trained, and networks without BatchNorm are only copied.
    """
    folded: Classifier = nnx.clone(model)
    folded.eval()
    for _, module in nnx.iter_modules(folded):
        if isinstance(module, BatchNorm) and not module.is_folded:
            scale = jax.lax.rsqrt(module.variance[...] + module.epsilon) * module.gain[...]
            module.bias = nnx.Param(module.bias[...] - module.mean[...] * scale)
            module.gain = nnx.Param(scale)
            empty = jnp.zeros((0,), jnp.float32)
            module.mean, module.variance, module.count = (nnx.BatchStat(empty) for _ in range(3))
            module.is_folded = True
    for conv, norm in folded.convolutions_before_norms():
        if not norm.gain[...].size:  # it is part of the kernel already
            continue
        conv.kernel = nnx.Param(conv.kernel[...] * norm.gain[...])
        norm.gain = nnx.Param(jnp.ones((0,), jnp.float32))
    return folded
