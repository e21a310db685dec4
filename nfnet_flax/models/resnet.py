"""Baselines with BatchNorm: pre-activation ResNet (He et al. 2016), and SE-ResNeXt-D, on which NFNets are based.

The D form (He et al. 2019, arXiv 1812.01187) has a stem of three 3x3 convolutions, and an average pool before the
projection of a shortcut; ResNeXt groups the 3x3 convolutions; squeeze-excite (Hu et al. 2018) gates a block's output.
"""

import dataclasses
import functools
from typing import Self

import jax
from flax import nnx

from nfnet_flax.config import require
from nfnet_flax.models import layers
from nfnet_flax.models.classifier import BlockSpec, Classifier, block_specs
from nfnet_flax.models.config import ImageSizes, StagedConfig, check_positive, check_rates
from nfnet_flax.models.convolution import avg_pool_2x2
from nfnet_flax.models.layers import AnyRngs, BatchNorm, Conv, InitRngs, SqueezeExcite

_STAGE_STRIDES = (1, 2, 2, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(StagedConfig):
    """Shape of one ResNet."""

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    """Number of channels after the stem."""
    expansion: float = 0.25
    """Bottleneck channels as a share of a block's output channels."""
    num_groups: int = 1
    """Number of groups of the 3x3 convolutions, the same in all stages (ResNeXt: 32)."""
    se_ratio: float | None = None
    """Hidden channels of squeeze-excite after a block's last convolution, as a share of its input channels; None: no
    squeeze-excite."""
    is_d: bool = False
    """The D form: three 3x3 convolutions instead of one of 7x7 in the stem, and an average pool before the projection
    of a strided shortcut."""
    batch_norm_decay: float = 0.9
    """Decay of the running mean and variance."""
    batch_norm_epsilon: float = 1e-5
    """Number added to the variance before the division."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(batch_norm_decay=self.batch_norm_decay)
        check_positive(expansion=self.expansion, se_ratio=self.se_ratio, batch_norm_epsilon=self.batch_norm_epsilon)
        require(self.stem_width >= 2, "model.stem_width", self.stem_width, "must be at least 2")
        require(self.num_groups >= 1, "model.num_groups", self.num_groups, "must be at least 1")
        for width in self.widths:
            bottleneck = int(width * self.expansion)
            require(
                bottleneck >= 1 and bottleneck % self.num_groups == 0,
                "model.widths",
                self.widths,
                f"a bottleneck of {bottleneck} channels does not divide into {self.num_groups} groups",
            )

    def build(self, num_classes: int, rngs: nnx.Rngs) -> "ResNet":
        return ResNet(self, num_classes=num_classes, rngs=rngs)

    def small(self) -> Self:
        groups = min(self.num_groups, 4)
        return dataclasses.replace(self, widths=(32, 32, 64, 64), depths=(1, 2, 1, 1), stem_width=16, num_groups=groups)


class ResNetBlock(nnx.Module):
    """Pre-activation bottleneck: 1x1, 3x3, 1x1, each after BatchNorm and relu; optionally squeeze-excite."""

    def __init__(
        self,
        config: ResNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        has_projection: bool,
        rngs: AnyRngs,
    ) -> None:
        width = int(out_channels * config.expansion)
        dtype = config.compute_dtype
        conv = functools.partial(Conv, compute_dtype=dtype, rngs=rngs)
        norm = functools.partial(BatchNorm, decay=config.batch_norm_decay, epsilon=config.batch_norm_epsilon)
        self.bn0 = norm(in_channels)
        self.conv0 = conv(in_channels, width, 1)
        self.bn1 = norm(width)
        self.conv1 = conv(width, width, 3, stride=stride, groups=config.num_groups)
        self.bn2 = norm(width)
        self.conv2 = conv(width, out_channels, 1)
        self.has_projection = has_projection
        self.pools = config.is_d and stride > 1
        if has_projection:
            self.conv_shortcut = conv(in_channels, out_channels, 1, stride=1 if self.pools else stride)
        self.has_squeeze_excite = config.se_ratio is not None
        if config.se_ratio is not None:
            hidden = max(1, int(out_channels * config.se_ratio))
            self.squeeze_excite = SqueezeExcite(out_channels, hidden, compute_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, keys: jax.Array | None, spec: BlockSpec) -> tuple[jax.Array, jax.Array]:
        """(N, H, W, I) -> (N, H / stride, W / stride, O): the block's output, and its branch; keys are not used."""
        del keys, spec
        h = jax.nn.relu(self.bn0(x))
        shortcut = x
        if self.has_projection:
            shortcut = self.conv_shortcut(avg_pool_2x2(h) if self.pools else h)
        h = self.conv0(h)
        h = self.conv1(jax.nn.relu(self.bn1(h)))
        h = self.conv2(jax.nn.relu(self.bn2(h)))
        if self.has_squeeze_excite:
            h = self.squeeze_excite(h) * h
        return h + shortcut, h


class ResNet(Classifier):
    """The network: stem, maximum pool, up to four stages, BatchNorm, relu, mean pool, dropout, head."""

    def __init__(self, config: ResNetConfig, *, num_classes: int, rngs: nnx.Rngs) -> None:
        init_rngs = InitRngs(rngs)
        dtype = config.compute_dtype
        conv = functools.partial(Conv, compute_dtype=dtype, rngs=init_rngs)
        norm = functools.partial(BatchNorm, decay=config.batch_norm_decay, epsilon=config.batch_norm_epsilon)
        channels = config.stem_width
        if config.is_d:
            half = channels // 2
            self.stem = nnx.List(
                [conv(config.in_channels, half, 3, stride=2), conv(half, half, 3), conv(half, channels, 3)]
            )
            self.stem_norms = nnx.List([norm(half), norm(half)])
        else:
            self.stem = nnx.List([conv(config.in_channels, channels, 7, stride=2)])
            self.stem_norms = nnx.List([])
        stage_inputs = (channels, *config.widths[:-1])

        def make_block(stage: int, position: int) -> ResNetBlock:
            first, width = position == 0, config.widths[stage]
            return ResNetBlock(
                config,
                stage_inputs[stage] if first else width,
                width,
                stride=_STAGE_STRIDES[stage] if first else 1,
                has_projection=first,
                rngs=init_rngs,
            )

        specs = block_specs(config.depths, alpha=0.0, stochdepth_rate=0.0)
        self._add_blocks(make_block, specs)
        channels = config.widths[-1]
        self.final_bn = norm(channels)
        self.config = config
        self._add_head(
            channels,
            num_classes,
            kernel_init=nnx.initializers.zeros,
            drop_rate=config.drop_rate,
            compute_dtype=dtype,
            rngs=init_rngs,
        )

    def convolutions_before_norms(self) -> list[tuple[Conv, BatchNorm]]:
        pairs = list(zip(list(self.stem)[:-1], self.stem_norms, strict=True))
        for stage in self.stages:
            for block in stage:
                pairs += [(block.conv0, block.bn1), (block.conv1, block.bn2)]
        return pairs

    def _stem(self, x: jax.Array) -> jax.Array:
        x = self.stem[0](x)
        for norm, conv in zip(self.stem_norms, list(self.stem)[1:], strict=True):
            x = conv(jax.nn.relu(norm(x)))
        return layers.max_pool_3x3(x)

    def _final(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.final_bn(x))


VARIANTS: dict[str, ResNetConfig] = {
    "resnet50": ResNetConfig(depths=(3, 4, 6, 3)),
    "resnet101": ResNetConfig(depths=(3, 4, 23, 3)),
    "resnet152": ResNetConfig(depths=(3, 8, 36, 3)),
    "resnet200": ResNetConfig(depths=(3, 24, 36, 3)),
    # 32 groups of 4 to 32 channels as in ResNeXt-50 32x4d, and a reduction of 16 as in SENet.
    "se_resnext_d50": ResNetConfig(depths=(3, 4, 6, 3), expansion=0.5, num_groups=32, se_ratio=1 / 16, is_d=True),
}
IMAGE_SIZES = dict.fromkeys(VARIANTS, ImageSizes(train=224, test=224))
