"""NFNet: a normalizer-free network based on SE-ResNeXt-D (Brock et al. 2021, arXiv 2102.06171, section 4).

The examples of a batch do not influence one another. The variance of the signal is controlled by standardized weights,
activations that are scaled to unit variance, and the two constants of a residual block
`x + alpha * f(x / expected_std(x))`.
"""

import dataclasses
import functools
from typing import Self

import jax
from flax import nnx

from nfnet_flax.config import require
from nfnet_flax.models.classifier import HEAD_NORMAL, Classifier, block_specs
from nfnet_flax.models.config import ImageSizes, NormalizerFreeConfig, check_positive
from nfnet_flax.models.layers import (
    ActivationName,
    AnyRngs,
    InitRngs,
    SqueezeExcite,
    WSConv,
    activate,
)
from nfnet_flax.models.nf_block import NFBlock
from nfnet_flax.models.standardization import StandardizationName

_STAGE_STRIDES = (1, 2, 2, 2)
_STEM_CHANNELS = (16, 32, 64)
_STEM_STRIDES = (2, 1, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFNetConfig(NormalizerFreeConfig):
    """Shape and regularization of one NFNet."""

    group_width: int = 128
    """Number of channels in each group of the grouped 3x3 convolutions."""
    expansion: float = 0.5
    """Bottleneck channels as a share of a block's output channels."""
    se_ratio: float = 0.5
    """Hidden channels of squeeze-excite as a share of its input channels."""
    activation: ActivationName = "gelu"
    standardization: StandardizationName = "published"
    """Form of the weight standardization; weights that were trained with timm need `timm`."""
    stochdepth_rate: float = 0.25
    """Stochastic depth: block k of n is dropped with probability `stochdepth_rate * k / n`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(expansion=self.expansion, se_ratio=self.se_ratio)
        require(self.group_width >= 1, "model.group_width", self.group_width, "must be at least 1")
        for width in self.widths:
            require(
                int(width * self.expansion) >= self.group_width,
                "model.widths",
                self.widths,
                f"width {width} times expansion {self.expansion} is less than one group of {self.group_width} channels",
            )

    def build(self, num_classes: int, rngs: nnx.Rngs) -> "NFNet":
        return NFNet(self, num_classes=num_classes, rngs=rngs)

    def small(self) -> Self:
        return dataclasses.replace(self, widths=(16, 16, 32, 32), depths=(1, 2, 1, 1), group_width=8)


class NFNetBlock(NFBlock):
    """Pre-activation bottleneck: 1x1, two grouped 3x3, 1x1, squeeze-excite times 2."""

    def __init__(self, config: NFNetConfig, in_channels: int, out_channels: int, stride: int, rngs: AnyRngs) -> None:
        groups = int(out_channels * config.expansion) // config.group_width
        width = groups * config.group_width
        dtype = config.compute_dtype
        conv = functools.partial(WSConv, standardization=config.standardization, compute_dtype=dtype, rngs=rngs)
        self.conv0 = conv(in_channels, width, 1)
        self.conv1 = conv(width, width, 3, stride=stride, groups=groups)
        self.conv1b = conv(width, width, 3, groups=groups)
        self.conv2 = conv(width, out_channels, 1)
        projects = stride > 1 or in_channels != out_channels
        super().__init__(
            activation=config.activation,
            alpha=config.alpha,
            drops=config.stochdepth_rate > 0,
            conv_shortcut=conv(in_channels, out_channels, 1) if projects else None,
            pools=stride > 1,
        )
        hidden = max(1, int(out_channels * config.se_ratio))
        self.squeeze_excite = SqueezeExcite(out_channels, hidden, compute_dtype=dtype, rngs=rngs)

    def _branch(self, h: jax.Array) -> jax.Array:
        h = self.conv0(h)
        h = self.conv1(self._activate(h))
        h = self.conv1b(self._activate(h))
        return 2 * self.squeeze_excite.gate(*self.conv2.without_bias(self._activate(h)))


class NFNet(Classifier):
    """The network: a stem of four 3x3 convolutions, up to four stages, a final 1x1 convolution, pool, dropout, head."""

    config: NFNetConfig
    is_foldable = True

    def __init__(self, config: NFNetConfig, *, num_classes: int, rngs: nnx.Rngs) -> None:
        init_rngs = InitRngs(rngs)
        dtype = config.compute_dtype
        conv = functools.partial(WSConv, standardization=config.standardization, compute_dtype=dtype, rngs=init_rngs)
        channels, stem = config.in_channels, []
        for out, stride in zip((*_STEM_CHANNELS, config.widths[0] // 2), _STEM_STRIDES, strict=True):
            stem.append(conv(channels, out, 3, stride=stride))
            channels = out
        self.stem = nnx.List(stem)

        stage_inputs = (channels, *config.widths[:-1])

        def make_block(stage: int, position: int) -> NFNetBlock:
            width = config.widths[stage]
            if position > 0:
                return NFNetBlock(config, width, width, 1, init_rngs)
            return NFNetBlock(config, stage_inputs[stage], width, _STAGE_STRIDES[stage], init_rngs)

        specs = block_specs(config.depths, alpha=config.alpha, stochdepth_rate=config.stochdepth_rate)
        self._add_blocks(make_block, specs)

        num_features = 2 * config.widths[-1]
        self.final_conv = conv(config.widths[-1], num_features, 1)
        self.config = config
        self._add_head(
            num_features,
            num_classes,
            kernel_init=HEAD_NORMAL,
            drop_rate=config.drop_rate,
            compute_dtype=dtype,
            rngs=init_rngs,
        )

    def convolutions_after_scaling(self) -> list[nnx.Module]:
        return [conv for position, conv in enumerate(self.stem) if position > 0]

    def _stem(self, x: jax.Array) -> jax.Array:
        for position, conv in enumerate(self.stem):
            x = conv(x if position == 0 else activate(self.config.activation, x, scaled=not self.is_folded))
        return x

    def _final(self, x: jax.Array) -> jax.Array:
        return activate(self.config.activation, self.final_conv(x))


# Depth multiple, dropout, training and test resolution (arXiv 2102.06171, table 1).
_TABLE = (
    (1, 0.2, 192, 256),
    (2, 0.3, 224, 320),
    (3, 0.4, 256, 352),
    (4, 0.4, 320, 416),
    (5, 0.5, 384, 512),
    (6, 0.5, 416, 544),
    (7, 0.5, 448, 576),
    (8, 0.5, 480, 608),
)
_WIDTHS = {"": (256, 512, 1536, 1536), "+": (384, 768, 2048, 2048)}
VARIANTS = {
    f"nfnet_f{level}{suffix}": NFNetConfig(
        widths=widths, depths=(multiple, 2 * multiple, 6 * multiple, 3 * multiple), drop_rate=drop_rate
    )
    for suffix, widths in _WIDTHS.items()
    for level, (multiple, drop_rate, _, _) in enumerate(_TABLE)
}
IMAGE_SIZES = {
    f"nfnet_f{level}{suffix}": ImageSizes(train, test)
    for suffix in _WIDTHS
    for level, (_, _, train, test) in enumerate(_TABLE)
}
