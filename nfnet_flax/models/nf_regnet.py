"""NF-RegNet: normalizer-free networks as cheap as EfficientNets, built of grouped bottlenecks (arXiv 2101.08692)."""

import dataclasses
import functools
from typing import Self

import jax
from flax import nnx

from nfnet_flax.config import require
from nfnet_flax.models.classifier import Classifier, block_specs
from nfnet_flax.models.config import ImageSizes, NormalizerFreeConfig, check_positive
from nfnet_flax.models.layers import ActivationName, AnyRngs, InitRngs, SqueezeExcite, WSConv, activate
from nfnet_flax.models.nf_block import NFBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFRegNetConfig(NormalizerFreeConfig):
    """Shape and regularization of one NF-RegNet."""

    widths: tuple[int, ...]
    """Number of output channels of each stage, before it is multiplied by `width_multiplier`."""
    width_multiplier: float = 0.75
    """Factor on the widths; the products are rounded down."""
    expansion: float = 2.25
    """Bottleneck channels as a multiple of a block's *input* channels; in the first block of the network it is 1."""
    group_width: int = 8
    """Number of channels in each group of the grouped 3x3 convolutions."""
    se_ratio: float = 0.5
    """Hidden channels of squeeze-excite as a share of its input channels."""
    activation: ActivationName = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(expansion=self.expansion, se_ratio=self.se_ratio, group_width=self.group_width)
        require(self.width_multiplier > 0, "model.width_multiplier", self.width_multiplier, "must be positive")
        require(
            min(self.channels) * min(1.0, self.expansion) >= self.group_width,
            "model.widths",
            self.widths,
            f"a bottleneck is less than one group of {self.group_width} channels",
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        return tuple(int(width * self.width_multiplier) for width in self.widths)

    def build(self, num_classes: int, rngs: nnx.Rngs) -> "NFRegNet":
        return NFRegNet(self, num_classes=num_classes, rngs=rngs)

    def small(self) -> Self:
        return dataclasses.replace(self, widths=(16, 16, 24, 24), depths=(1, 2, 1, 1))


class NFRegNetBlock(NFBlock):
    """Pre-activation bottleneck: 1x1, grouped 3x3, squeeze-excite times 2, 1x1."""

    def __init__(
        self,
        config: NFRegNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        expansion: float,
        stride: int,
        rngs: AnyRngs,
    ) -> None:
        groups = int(in_channels * expansion) // config.group_width
        width = groups * config.group_width
        dtype = config.compute_dtype
        conv = functools.partial(WSConv, compute_dtype=dtype, rngs=rngs)
        self.conv0 = conv(in_channels, width, 1)
        self.conv1 = conv(width, width, 3, stride=stride, groups=groups)
        self.conv2 = conv(width, out_channels, 1)
        projects = stride > 1 or in_channels != out_channels
        super().__init__(
            activation=config.activation,
            alpha=config.alpha,
            drops=config.stochdepth_rate > 0,
            conv_shortcut=conv(in_channels, out_channels, 1) if projects else None,
            pools=stride > 1,
        )
        hidden = max(1, int(width * config.se_ratio))
        self.squeeze_excite = SqueezeExcite(width, hidden, compute_dtype=dtype, rngs=rngs)

    def _branch(self, h: jax.Array) -> jax.Array:
        h = self.conv0(h)
        h = 2 * self.squeeze_excite.gate(*self.conv1.without_bias(self._activate(h)))
        return self.conv2(self._activate(h))


class NFRegNet(Classifier):
    """The network: 3x3 convolution, up to four stages, a final 1x1 convolution, mean pool, dropout, head."""

    config: NFRegNetConfig
    is_foldable = True

    def __init__(self, config: NFRegNetConfig, *, num_classes: int, rngs: nnx.Rngs) -> None:
        init_rngs = InitRngs(rngs)
        dtype = config.compute_dtype
        conv = functools.partial(WSConv, compute_dtype=dtype, rngs=init_rngs)
        channels = config.channels
        self.stem = conv(config.in_channels, channels[0], 3, stride=2)
        stage_inputs = (channels[0], *channels[:-1])

        def make_block(stage: int, position: int) -> NFRegNetBlock:
            first = position == 0
            return NFRegNetBlock(
                config,
                stage_inputs[stage] if first else channels[stage],
                channels[stage],
                expansion=1.0 if stage == 0 and first else config.expansion,
                stride=2 if first else 1,
                rngs=init_rngs,
            )

        specs = block_specs(config.depths, alpha=config.alpha, stochdepth_rate=config.stochdepth_rate)
        self._add_blocks(make_block, specs)
        num_features = 1280 * channels[-1] // 440
        self.final_conv = conv(channels[-1], num_features, 1)
        self.config = config
        self._add_head(
            num_features,
            num_classes,
            kernel_init=nnx.initializers.zeros,
            drop_rate=config.drop_rate,
            compute_dtype=dtype,
            rngs=init_rngs,
        )

    def _stem(self, x: jax.Array) -> jax.Array:
        return self.stem(x)

    def _final(self, x: jax.Array) -> jax.Array:
        return activate(self.config.activation, self.final_conv(x))


# Widths, depths, dropout, training and test resolution (the published code's table).
_TABLE = (
    ((48, 104, 208, 440), (1, 3, 6, 6), 0.2, 192, 224),
    ((48, 104, 208, 440), (2, 4, 7, 7), 0.2, 224, 256),
    ((56, 112, 232, 488), (2, 4, 8, 8), 0.3, 240, 272),
    ((56, 128, 248, 528), (2, 5, 9, 9), 0.3, 288, 320),
    ((64, 144, 288, 616), (2, 6, 11, 11), 0.4, 320, 384),
    ((80, 168, 336, 704), (3, 7, 14, 14), 0.4, 384, 456),
    ((88, 184, 376, 792), (3, 8, 16, 16), 0.5, 448, 528),
    ((96, 208, 416, 880), (4, 10, 19, 19), 0.5, 512, 600),
    ((104, 232, 456, 968), (4, 11, 22, 22), 0.5, 600, 672),
)
VARIANTS = {
    f"nf_regnet_b{level}": NFRegNetConfig(widths=widths, depths=depths, drop_rate=drop_rate)
    for level, (widths, depths, drop_rate, _, _) in enumerate(_TABLE)
}
IMAGE_SIZES = {f"nf_regnet_b{level}": ImageSizes(train, test) for level, (*_, train, test) in enumerate(_TABLE)}
