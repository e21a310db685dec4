"""The common part of all normalizer-free residual blocks (arXiv 2101.08692)."""

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.models import layers
from nfnet_flax.models.classifier import BlockSpec
from nfnet_flax.models.convolution import avg_pool_2x2
from nfnet_flax.models.layers import ActivationName, WSConv, activate


class NFBlock(nnx.Module):
    """`shortcut + alpha * skip_gain * branch(h)` with `h = activation(x) * beta`; there may be no skip gain.

    A family defines `_branch` and the modules that it needs; `conv_shortcut` is the projection of the shortcut, if any.
    """

    def __init__(
        self,
        *,
        activation: ActivationName,
        alpha: float,
        drops: bool,
        conv_shortcut: WSConv | None,
        pools: bool,
        has_skip_gain: bool = True,
    ) -> None:
        if conv_shortcut is not None:
            self.conv_shortcut = conv_shortcut
        self.has_projection = conv_shortcut is not None
        self.has_skip_gain = has_skip_gain
        if has_skip_gain:
            self.skip_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.activation: ActivationName = activation
        self.is_folded = False
        self.alpha = alpha
        self.drops = drops
        self.pools = pools
        self.deterministic = False

    def _activate(self, x: jax.Array) -> jax.Array:
        return activate(self.activation, x, scaled=not self.is_folded)

    def _branch(self, h: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, x: jax.Array, keys: jax.Array | None, spec: BlockSpec) -> tuple[jax.Array, jax.Array]:
        """(N, H, W, I) -> (N, H / stride, W / stride, O): the block's output, and its branch before it is scaled."""
        h = self._activate(x)
        if not self.is_folded:
            h = h * jnp.asarray(spec.beta, x.dtype)
        shortcut = x
        if self.has_projection:
            shortcut = self.conv_shortcut(avg_pool_2x2(h) if self.pools else h)
        branch = self._branch(h)
        kept = branch
        if self.drops and not self.deterministic:
            kept = layers.drop_path(branch, spec.drop_path_rate, layers.layer_keys(keys, spec.index))
        if not self.has_skip_gain:
            return kept * jnp.asarray(self.alpha, kept.dtype) + shortcut, branch
        scale = self.skip_gain[...].astype(layers.statistics_dtype(kept.dtype)) * self.alpha
        return kept * scale.astype(kept.dtype) + shortcut, branch
