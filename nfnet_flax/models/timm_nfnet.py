"""The normalizer-free networks of timm that differ from the published ones (`timm/models/nfnet.py`).

Among them are the light networks, with weights that are good for fine-tuning on few images. They differ from the
published networks (arXiv 2101.08692, 2102.06171) in this: padding is symmetric; numbers of channels are multiples of 8;
each convolution, also the first and the last one, is multiplied by the activation's gamma, and activations are not, so
that the last one is not scaled; there is no skip gain, and the gain of a block's last convolution begins at zero
instead; and squeeze-excite may be replaced by efficient channel attention.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import require
from nfnet_flax.models import layers
from nfnet_flax.models.classifier import HEAD_NORMAL, Classifier, block_specs
from nfnet_flax.models.config import NormalizerFreeConfig, check_positive
from nfnet_flax.models.layers import (
    ACTIVATIONS,
    DTYPES,
    FAN_IN_NORMAL,
    ActivationName,
    AnyRngs,
    ComputeDtype,
    InitRngs,
    SqueezeExcite,
    WSConv,
    activate,
)
from nfnet_flax.models.nf_block import NFBlock
from nfnet_flax.models.scopes import NamedLayer, scoped
from nfnet_flax.models.standardization import StandardizationName

StemName = Literal["four_3x3", "3x3", "7x7_pool"]
AttentionName = Literal["squeeze_excite", "efficient_channel", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmNFNetConfig(NormalizerFreeConfig):
    """Shape and regularization of one of timm's normalizer-free networks."""

    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    """Number of output channels of each stage, before it is multiplied by `width_multiplier`."""
    width_multiplier: float = 1.0
    """Factor on the widths and on `num_final`; the products are rounded to multiples of 8."""
    stem: StemName = "four_3x3"
    """First layers: four 3x3 convolutions (stride 4), one 3x3 convolution (stride 2), or a 7x7 convolution and a
    maximum pool (stride 4)."""
    stem_width: int | None = 128
    """Number of channels of the last convolution of the stem; None: that of the first stage."""
    group_width: int | None = 64
    """Number of channels in each group of the 3x3 convolutions; None: one group."""
    expansion: float = 0.25
    """Bottleneck channels as a multiple of a block's output channels."""
    is_regnet: bool = False
    """Blocks of RegNet: `expansion` is of a block's input channels (1 in the first block of the network), attention
    comes before the last convolution, and every stage halves the resolution."""
    has_second_3x3: bool = True
    """Whether a block has two 3x3 convolutions."""
    attention: AttentionName = "squeeze_excite"
    """Channel attention of each block: squeeze-excite; efficient channel attention (arXiv 1910.03151); or none."""
    se_ratio: float = 0.5
    """Hidden channels of squeeze-excite as a share of its input channels, rounded to a multiple of 8."""
    num_final: int | None = 3072
    """Number of output channels of the last, 1x1 convolution, before it is multiplied by `width_multiplier`; None:
    there is no such convolution."""
    activation: ActivationName = "silu"
    standardization: StandardizationName = "timm"
    """Form of the weight standardization; weights that were trained with timm need `timm`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            width_multiplier=self.width_multiplier,
            stem_width=self.stem_width,
            group_width=self.group_width,
            expansion=self.expansion,
            se_ratio=self.se_ratio,
            num_final=self.num_final,
        )
        for width in self.channels:
            fits = self.group_width is None or rounded(width * min(1.0, self.expansion)) >= self.group_width
            remedy = f"a bottleneck of a stage of {width} channels is less than one group of {self.group_width}"
            require(fits, "model.widths", self.widths, remedy)

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        return tuple(rounded(width * self.width_multiplier) for width in self.widths)

    def build(self, num_classes: int, rngs: nnx.Rngs) -> "TimmNFNet":
        return TimmNFNet(self, num_classes=num_classes, rngs=rngs)

    def small(self) -> Self:
        return dataclasses.replace(
            self,
            widths=(32, 32, 64, 64),
            depths=(1, 2, 1, 1),
            width_multiplier=1.0,
            group_width=None if self.group_width is None else 8,
            num_final=None if self.num_final is None else 48,
            stem_width=None if self.stem_width is None else 16,
        )


def rounded(channels: float, limit: float = 0.9) -> int:
    """A multiple of 8 near a number of channels, and not below `limit` times this number."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < limit * channels else nearest


def _convolution(config: TimmNFNetConfig, rngs: AnyRngs) -> Callable[..., WSConv]:
    return functools.partial(
        WSConv,
        standardization=config.standardization,
        has_symmetric_padding=True,
        compute_dtype=config.compute_dtype,
        rngs=rngs,
    )


class EfficientChannelAttention(NamedLayer):
    """Channel gate in (0, 1): mean over H and W, weighted sum of neighbouring channels, sigmoid (arXiv 1910.03151)."""

    def __init__(self, channels: int, *, compute_dtype: ComputeDtype, rngs: AnyRngs) -> None:
        size = int(abs(math.log2(channels) + 1) / 2)
        self.size = max(size if size % 2 else size + 1, 3)
        self.kernel = nnx.Param(FAN_IN_NORMAL(rngs.params(), (self.size, 1), jnp.float32))
        self.compute_dtype: ComputeDtype = compute_dtype

    @scoped
    def gate(self, y: jax.Array, bias: jax.Array) -> jax.Array:
        """The gate of `y + bias` times `y + bias`, for a convolution (N, H, W, C) and its bias (C,)."""
        pooled = jnp.mean(y, axis=(1, 2), keepdims=True) + bias
        kernel = self.kernel[...].astype(DTYPES[self.compute_dtype])
        num_channels, margin = pooled.shape[-1], self.size // 2
        padded = jnp.pad(pooled, ((0, 0), (0, 0), (0, 0), (margin, margin)))
        shifted = [padded[..., tap : tap + num_channels] * kernel[tap, 0] for tap in range(self.size)]
        factor = jax.nn.sigmoid(functools.reduce(jnp.add, shifted))
        return factor * y + factor * bias


class TimmNFBlock(NFBlock):
    """Pre-activation bottleneck: 1x1, one or two 3x3, 1x1, with attention times 2 after the last or the one before."""

    def __init__(
        self,
        config: TimmNFNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        expansion: float,
        stride: int,
        rngs: AnyRngs,
    ) -> None:
        dtype = config.compute_dtype
        width = rounded((in_channels if config.is_regnet else out_channels) * expansion)
        groups = 1
        if config.group_width is not None:
            groups = width // config.group_width
            width = groups * config.group_width
        conv = _convolution(config, rngs)
        self.conv0 = conv(in_channels, width, 1)
        self.conv1 = conv(width, width, 3, stride=stride, groups=groups)
        self.has_second_3x3 = config.has_second_3x3
        if config.has_second_3x3:
            self.conv1b = conv(width, width, 3, groups=groups)
        self.conv2 = conv(width, out_channels, 1)
        self.conv2.gain = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        projects = stride > 1 or in_channels != out_channels
        super().__init__(
            activation=config.activation,
            alpha=config.alpha,
            drops=config.stochdepth_rate > 0,
            conv_shortcut=conv(in_channels, out_channels, 1) if projects else None,
            pools=stride > 1,
            has_skip_gain=False,
        )
        self.attends_last = not config.is_regnet and config.attention != "none"
        self.attends_before = config.is_regnet and config.attention != "none"
        attended = width if config.is_regnet else out_channels
        self.attention: SqueezeExcite | EfficientChannelAttention
        if config.attention == "squeeze_excite":
            hidden = rounded(attended * config.se_ratio, limit=0.0)
            self.attention = SqueezeExcite(attended, hidden, compute_dtype=dtype, rngs=rngs)
        elif config.attention == "efficient_channel":
            self.attention = EfficientChannelAttention(attended, compute_dtype=dtype, rngs=rngs)

    def _branch(self, h: jax.Array) -> jax.Array:
        h = self.conv0(h)
        if self.has_second_3x3:
            h = self.conv1(self._activate(h))
        last = self.conv1b if self.has_second_3x3 else self.conv1
        h, bias = last.without_bias(self._activate(h))
        h = 2 * self.attention.gate(h, bias) if self.attends_before else h + bias
        h, bias = self.conv2.without_bias(self._activate(h))
        return 2 * self.attention.gate(h, bias) if self.attends_last else h + bias


class TimmNFNet(Classifier):
    """The network: stem, up to four stages, optionally a last 1x1 convolution, activation, mean pool, dropout, head."""

    config: TimmNFNetConfig
    is_foldable = True

    def __init__(self, config: TimmNFNetConfig, *, num_classes: int, rngs: nnx.Rngs) -> None:
        init_rngs = InitRngs(rngs)
        dtype = config.compute_dtype
        conv = _convolution(config, init_rngs)
        stages = config.channels
        stem_width = stages[0] if config.stem_width is None else rounded(config.stem_width * config.width_multiplier)
        if config.stem == "four_3x3":
            widths, strides = (config.in_channels, *(stem_width // share for share in (8, 4, 2, 1))), (2, 1, 1, 2)
            self.stem = nnx.List([conv(widths[i], widths[i + 1], 3, stride=strides[i]) for i in range(4)])
        else:
            size = 7 if config.stem == "7x7_pool" else 3
            self.stem = nnx.List([conv(config.in_channels, stem_width, size, stride=2)])
        stage_inputs = (stem_width, *stages[:-1])

        def make_block(stage: int, position: int) -> TimmNFBlock:
            is_first = position == 0
            halves = is_first and (stage > 0 or config.stem == "3x3")
            return TimmNFBlock(
                config,
                stage_inputs[stage] if is_first else stages[stage],
                stages[stage],
                expansion=1.0 if config.is_regnet and is_first and stage == 0 else config.expansion,
                stride=2 if halves else 1,
                rngs=init_rngs,
            )

        specs = block_specs(config.depths, alpha=config.alpha, stochdepth_rate=config.stochdepth_rate)
        self._add_blocks(make_block, specs)
        num_features = stages[-1]
        if config.num_final is not None:
            num_features = rounded(config.num_final * config.width_multiplier)
            self.final_conv = conv(stages[-1], num_features, 1)
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
        return [*self.stem, *([] if self.config.num_final is None else [self.final_conv])]

    def _scaled(self, x: jax.Array) -> jax.Array:
        """What timm multiplies the result of the next convolution by."""
        _, gamma = ACTIVATIONS[self.config.activation]
        return x if self.is_folded else x * jnp.asarray(gamma, x.dtype)

    def _stem(self, x: jax.Array) -> jax.Array:
        for position, conv in enumerate(self.stem):
            x = conv(self._scaled(x if position == 0 else activate(self.config.activation, x, scaled=False)))
        return layers.max_pool_3x3(x, is_symmetric=True) if self.config.stem == "7x7_pool" else x

    def _final(self, x: jax.Array) -> jax.Array:
        x = x if self.config.num_final is None else self.final_conv(self._scaled(x))
        return activate(self.config.activation, x, scaled=False)
