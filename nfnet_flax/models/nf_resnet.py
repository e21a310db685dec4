"""NF-ResNet: pre-activation ResNet with scaled weight standardization instead of BatchNorm (arXiv 2101.08692)."""

import dataclasses
import functools
from typing import Self

import jax
from flax import nnx

from nfnet_flax.config import require
from nfnet_flax.models import layers
from nfnet_flax.models.classifier import HEAD_NORMAL, Classifier, block_specs
from nfnet_flax.models.config import ImageSizes, NormalizerFreeConfig, check_positive
from nfnet_flax.models.layers import AnyRngs, InitRngs, SqueezeExcite, WSConv, activate
from nfnet_flax.models.nf_block import NFBlock

_STAGE_STRIDES = (1, 2, 2, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFResNetConfig(NormalizerFreeConfig):
    """Shape and regularization of one NF-ResNet."""

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    """Number of channels of the first, 7x7 convolution."""
    expansion: float = 0.25
    """Bottleneck channels as a share of a block's output channels."""
    se_ratio: float | None = None
    """Hidden channels of squeeze-excite after a block's last convolution, as a share of its input channels (published:
    0.25); None: no squeeze-excite."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(expansion=self.expansion, se_ratio=self.se_ratio)
        require(self.stem_width >= 1, "model.stem_width", self.stem_width, "must be at least 1")
        require(int(min(self.widths) * self.expansion) >= 1, "model.widths", self.widths, "a bottleneck has no channel")

    def build(self, num_classes: int, rngs: nnx.Rngs) -> "NFResNet":
        return NFResNet(self, num_classes=num_classes, rngs=rngs)

    def small(self) -> Self:
        return dataclasses.replace(self, widths=(32, 32, 64, 64), depths=(1, 2, 1, 1), stem_width=16)


class NFResNetBlock(NFBlock):
    """Pre-activation bottleneck: 1x1, 3x3, 1x1, optionally squeeze-excite times 2."""

    def __init__(self, config: NFResNetConfig, in_channels: int, out_channels: int, stride: int, rngs: AnyRngs) -> None:
        width = int(out_channels * config.expansion)
        dtype = config.compute_dtype
        conv = functools.partial(WSConv, compute_dtype=dtype, rngs=rngs)
        self.conv0 = conv(in_channels, width, 1)
        self.conv1 = conv(width, width, 3, stride=stride)
        self.conv2 = conv(width, out_channels, 1)
        projects = stride > 1 or in_channels != out_channels
        super().__init__(
            activation=config.activation,
            alpha=config.alpha,
            drops=config.stochdepth_rate > 0,
            conv_shortcut=conv(in_channels, out_channels, 1, stride=stride) if projects else None,
            pools=False,
        )
        self.has_squeeze_excite = config.se_ratio is not None
        if config.se_ratio is not None:
            hidden = max(1, int(out_channels * config.se_ratio))
            self.squeeze_excite = SqueezeExcite(out_channels, hidden, compute_dtype=dtype, rngs=rngs)

    def _branch(self, h: jax.Array) -> jax.Array:
        h = self.conv0(h)
        h = self.conv1(self._activate(h))
        h, bias = self.conv2.without_bias(self._activate(h))
        return 2 * self.squeeze_excite.gate(h, bias) if self.has_squeeze_excite else h + bias


class NFResNet(Classifier):
    """The network: 7x7 convolution, maximum pool, up to four stages, activation, mean pool, dropout, head."""

    config: NFResNetConfig
    is_foldable = True

    def __init__(self, config: NFResNetConfig, *, num_classes: int, rngs: nnx.Rngs) -> None:
        init_rngs = InitRngs(rngs)
        dtype = config.compute_dtype
        self.stem = WSConv(config.in_channels, config.stem_width, 7, stride=2, compute_dtype=dtype, rngs=init_rngs)
        stage_inputs = (config.stem_width, *config.widths[:-1])

        def make_block(stage: int, position: int) -> NFResNetBlock:
            width = config.widths[stage]
            if position > 0:
                return NFResNetBlock(config, width, width, 1, init_rngs)
            return NFResNetBlock(config, stage_inputs[stage], width, _STAGE_STRIDES[stage], init_rngs)

        specs = block_specs(config.depths, alpha=config.alpha, stochdepth_rate=config.stochdepth_rate)
        self._add_blocks(make_block, specs)
        self.config = config
        self._add_head(
            config.widths[-1],
            num_classes,
            kernel_init=HEAD_NORMAL,
            drop_rate=config.drop_rate,
            compute_dtype=dtype,
            rngs=init_rngs,
        )

    def _stem(self, x: jax.Array) -> jax.Array:
        return layers.max_pool_3x3(self.stem(x))

    def _final(self, x: jax.Array) -> jax.Array:
        return activate(self.config.activation, x)


VARIANTS: dict[str, NFResNetConfig] = {
    f"nf_resnet{depth}": NFResNetConfig(depths=depths)
    for depth, depths in (
        (50, (3, 4, 6, 3)),
        (101, (3, 4, 23, 3)),
        (152, (3, 8, 36, 3)),
        (200, (3, 24, 36, 3)),
        (288, (24, 24, 24, 24)),
        (600, (50, 50, 50, 50)),
    )
}
IMAGE_SIZES = dict.fromkeys(VARIANTS, ImageSizes(train=224, test=224))
