"""Baseline: EfficientNet B0-B7 (Tan and Le 2019, arXiv 1905.11946), with which the NFNet papers compare."""

import dataclasses
import functools
import math
from typing import Self

import jax
from flax import nnx

from nfnet_flax.models import layers
from nfnet_flax.models.classifier import BlockSpec, Classifier, block_specs
from nfnet_flax.models.config import ImageSizes, ModelConfig, check_positive, check_rates
from nfnet_flax.models.layers import AnyRngs, BatchNorm, Conv, InitRngs, SqueezeExcite

# Expansion of the input channels, window, stride, output channels and number of blocks of each stage of B0 (table 1).
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_STEM_WIDTH = 32
_FINAL_WIDTH = 1280
_CONV_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# HWIO depthwise kernels are (k, k, 1, C): the fan-out of one filter is k * k.
_DEPTHWISE_INIT = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
_HEAD_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetConfig(ModelConfig):
    """Shape and regularization of one EfficientNet, relative to B0."""

    width_multiplier: float = 1.0
    """Factor on the numbers of channels of B0; the products are rounded to multiples of 8."""
    depth_multiplier: float = 1.0
    """Factor on the numbers of blocks of B0's stages; the products are rounded up."""
    se_ratio: float = 0.25
    """Hidden channels of squeeze-excite as a share of the block's input channels."""
    drop_rate: float = 0.2
    """Probability of dropout before the head."""
    stochdepth_rate: float = 0.2
    """Stochastic depth (drop-connect): block k of n is dropped with probability `stochdepth_rate * k / n`; otherwise
    its branch is rescaled."""
    batch_norm_decay: float = 0.99
    """Decay of the running mean and variance."""
    batch_norm_epsilon: float = 1e-3
    """Number added to the variance before the division."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(
            drop_rate=self.drop_rate, stochdepth_rate=self.stochdepth_rate, batch_norm_decay=self.batch_norm_decay
        )
        check_positive(width_multiplier=self.width_multiplier, depth_multiplier=self.depth_multiplier)
        check_positive(se_ratio=self.se_ratio, batch_norm_epsilon=self.batch_norm_epsilon)

    def channels(self, base: int) -> int:
        """Number of channels where B0 has `base`: the nearest multiple of 8 that is at least 90% of the product."""
        scaled = base * self.width_multiplier
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * scaled else rounded

    def depth(self, base: int) -> int:
        """Number of blocks where B0 has `base`."""
        return math.ceil(base * self.depth_multiplier)

    def build(self, num_classes: int, rngs: nnx.Rngs) -> "EfficientNet":
        return EfficientNet(self, num_classes=num_classes, rngs=rngs)

    def small(self) -> Self:
        return dataclasses.replace(self, width_multiplier=0.25, depth_multiplier=0.3)

    @property
    def num_blocks(self) -> int:
        return sum(self.depth(repeats) for *_, repeats in _STAGES)


class EfficientNetBlock(nnx.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise, squeeze-excite, 1x1 projection, each with BatchNorm."""

    def __init__(
        self,
        config: EfficientNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        window: int,
        stride: int,
        rngs: AnyRngs,
    ) -> None:
        width = in_channels * expansion
        dtype = config.compute_dtype
        conv = functools.partial(Conv, compute_dtype=dtype, rngs=rngs)
        norm = functools.partial(BatchNorm, decay=config.batch_norm_decay, epsilon=config.batch_norm_epsilon)
        self.expands = expansion > 1
        if self.expands:
            self.expand = conv(in_channels, width, 1, kernel_init=_CONV_INIT)
            self.expand_norm = norm(width)
        self.depthwise = conv(width, width, window, stride=stride, groups=width, kernel_init=_DEPTHWISE_INIT)
        self.depthwise_norm = norm(width)
        hidden = max(1, int(in_channels * config.se_ratio))
        self.squeeze_excite = SqueezeExcite(width, hidden, activation=jax.nn.silu, compute_dtype=dtype, rngs=rngs)
        self.project = conv(width, out_channels, 1, kernel_init=_CONV_INIT)
        self.project_norm = norm(out_channels)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drops = config.stochdepth_rate > 0
        self.deterministic = False

    def __call__(self, x: jax.Array, keys: jax.Array | None, spec: BlockSpec) -> tuple[jax.Array, jax.Array]:
        """(N, H, W, I) -> (N, H / stride, W / stride, O): the block's output, and its branch before it is dropped."""
        h = jax.nn.silu(self.expand_norm(self.expand(x))) if self.expands else x
        h = jax.nn.silu(self.depthwise_norm(self.depthwise(h)))
        h = self.squeeze_excite(h) * h
        branch = self.project_norm(self.project(h))
        if not self.has_shortcut:
            return branch, branch
        kept = branch
        if self.drops and not self.deterministic:
            kept = layers.drop_path(branch, spec.drop_path_rate, layers.layer_keys(keys, spec.index), rescale=True)
        return kept + x, branch


class EfficientNet(Classifier):
    """The network: 3x3 convolution, seven stages, a final 1x1 convolution, mean pool, dropout, head."""

    def __init__(self, config: EfficientNetConfig, *, num_classes: int, rngs: nnx.Rngs) -> None:
        init_rngs = InitRngs(rngs)
        dtype = config.compute_dtype
        conv = functools.partial(Conv, kernel_init=_CONV_INIT, compute_dtype=dtype, rngs=init_rngs)
        norm = functools.partial(BatchNorm, decay=config.batch_norm_decay, epsilon=config.batch_norm_epsilon)
        channels = config.channels(_STEM_WIDTH)
        self.stem = conv(config.in_channels, channels, 3, stride=2)
        self.stem_norm = norm(channels)
        outputs = [config.channels(base) for *_, base, _ in _STAGES]
        stage_inputs = (channels, *outputs[:-1])

        def make_block(stage: int, position: int) -> EfficientNetBlock:
            expansion, window, stage_stride, _, _ = _STAGES[stage]
            return EfficientNetBlock(
                config,
                stage_inputs[stage] if position == 0 else outputs[stage],
                outputs[stage],
                expansion=expansion,
                window=window,
                stride=stage_stride if position == 0 else 1,
                rngs=init_rngs,
            )

        depths = [config.depth(repeats) for *_, repeats in _STAGES]
        specs = block_specs(depths, alpha=0.0, stochdepth_rate=config.stochdepth_rate)
        self._add_blocks(make_block, specs)
        num_features = config.channels(_FINAL_WIDTH)
        self.final_conv = conv(outputs[-1], num_features, 1)
        self.final_norm = norm(num_features)
        self.config = config
        self._add_head(
            num_features,
            num_classes,
            kernel_init=_HEAD_INIT,
            drop_rate=config.drop_rate,
            compute_dtype=dtype,
            rngs=init_rngs,
        )

    def convolutions_before_norms(self) -> list[tuple[Conv, BatchNorm]]:
        pairs = [(self.stem, self.stem_norm), (self.final_conv, self.final_norm)]
        for stage in self.stages:
            for block in stage:
                pairs += [(block.depthwise, block.depthwise_norm), (block.project, block.project_norm)]
                pairs += [(block.expand, block.expand_norm)] if block.expands else []
        return pairs

    def _stem(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.stem_norm(self.stem(x)))

    def _final(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.final_norm(self.final_conv(x)))


# Width, depth, resolution, dropout (the published code's table).
_TABLE = (
    (1.0, 1.0, 224, 0.2),
    (1.0, 1.1, 240, 0.2),
    (1.1, 1.2, 260, 0.3),
    (1.2, 1.4, 300, 0.3),
    (1.4, 1.8, 380, 0.4),
    (1.6, 2.2, 456, 0.4),
    (1.8, 2.6, 528, 0.5),
    (2.0, 3.1, 600, 0.5),
)
VARIANTS = {
    f"efficientnet_b{level}": EfficientNetConfig(width_multiplier=width, depth_multiplier=depth, drop_rate=drop_rate)
    for level, (width, depth, _, drop_rate) in enumerate(_TABLE)
}
IMAGE_SIZES = {f"efficientnet_b{level}": ImageSizes(size, size) for level, (_, _, size, _) in enumerate(_TABLE)}
