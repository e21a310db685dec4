"""The frame of a normalizer-free residual block, and how its constants follow from its depth (arXiv 2101.08692)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.models import layers
from nfnet_flax.models.layers import ActivationName, WSConv, activate


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Where a residual block stands in the network, and what follows from that."""

    index: int
    """Of all blocks, from 0."""
    is_first: bool
    """Of its stage."""
    beta: float
    """1 / expected standard deviation of the block's input."""
    drop_path_rate: float
    """Stochastic depth: probability that the branch is dropped for an example."""


def plan_blocks(depths: tuple[int, ...], *, alpha: float, stochdepth_rate: float) -> list[list[BlockPlan]]:
    """The blocks of each stage, with variance-preserving constants for a network whose branches have unit variance."""
    plans: list[list[BlockPlan]] = []
    expected_std, index = 1.0, 0
    for depth in depths:
        stage = []
        for position in range(depth):
            rate = stochdepth_rate * index / sum(depths)
            stage.append(BlockPlan(index, position == 0, 1.0 / expected_std, rate))
            # A stage's first block normalises its shortcut, too, so the variance starts anew there.
            expected_std = ((1.0 if position == 0 else expected_std**2) + alpha**2) ** 0.5
            index += 1
        plans.append(stage)
    return plans


class NFBlock(nnx.Module):
    """`shortcut + alpha * skip_gain * branch(h)` with `h = activation(x) * beta`.

    A family gives `_branch` and the modules that it needs; `conv_shortcut` is the projection of the shortcut, if any.
    """

    def __init__(
        self, plan: BlockPlan, *, activation: ActivationName, alpha: float, conv_shortcut: WSConv | None, pools: bool
    ) -> None:
        if conv_shortcut is not None:
            self.conv_shortcut = conv_shortcut
        self.has_projection = conv_shortcut is not None
        self.skip_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.plan = plan
        self.activation: ActivationName = activation
        self.alpha = alpha
        self.pools = pools
        self.deterministic = False

    def _branch(self, h: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """(N, H, W, I) -> (N, H / stride, W / stride, O): the block's output, and its branch before it is scaled."""
        h = activate(self.activation, x) * jnp.asarray(self.plan.beta, x.dtype)
        shortcut = x
        if self.has_projection:
            shortcut = self.conv_shortcut(layers.avg_pool_2x2(h) if self.pools else h)
        branch = self._branch(h)
        kept = branch
        if self.plan.drop_path_rate > 0 and not self.deterministic:
            kept = layers.drop_path(branch, self.plan.drop_path_rate, layers.layer_keys(keys, self.plan.index))
        scale = self.skip_gain[...].astype(layers.statistics_dtype(kept.dtype)) * self.alpha
        return kept * scale.astype(kept.dtype) + shortcut, branch
