"""NFNet: the normalizer-free descendant of SE-ResNeXt-D (Brock et al. 2021, arXiv 2102.06171, section 4).

Nothing in it couples the examples of a batch. Signal variance is kept by standardized weights, activations scaled to
unit variance, and the two constants of a residual block `x + alpha * f(x / expected_std(x))`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import check_types, require
from nfnet_flax.models import layers
from nfnet_flax.models.layers import (
    ActivationName,
    AnyRngs,
    ComputeDtype,
    Dense,
    InitRngs,
    SqueezeExcite,
    WSConv,
    activate,
)

_STAGE_STRIDES = (1, 2, 2, 2)
_STEM_CHANNELS = (16, 32, 64)
_STEM_STRIDES = (2, 1, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFNetConfig:
    """Shape and regularization of one NFNet."""

    widths: tuple[int, ...]
    """Output channels of each stage."""
    depths: tuple[int, ...]
    """Residual blocks of each stage."""
    group_width: int = 128
    """Channels of one group of the grouped 3x3 convolutions."""
    expansion: float = 0.5
    """Bottleneck channels as a share of a block's output channels."""
    se_ratio: float = 0.5
    """Hidden share of squeeze-excite."""
    alpha: float = 0.2
    """Scale of a residual branch."""
    activation: ActivationName = "gelu"
    drop_rate: float = 0.0
    """Dropout before the head."""
    stochdepth_rate: float = 0.25
    """Stochastic depth: block k of n is dropped with probability `stochdepth_rate * k / n`."""
    compute_dtype: ComputeDtype = "float32"
    """Of activations and standardized kernels; parameters are float32."""
    train_image_size: int = 192
    """Published training resolution, in pixels."""
    test_image_size: int = 256
    """Published evaluation resolution, in pixels."""

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.widths) == 4, "model.widths", self.widths, "give one width for each of the 4 stages")
        require(len(self.depths) == 4, "model.depths", self.depths, "give one depth for each of the 4 stages")
        require(min(self.depths) >= 1, "model.depths", self.depths, "every stage needs at least one block")
        require(self.group_width >= 1, "model.group_width", self.group_width, "must be at least 1")
        for width in self.widths:
            require(
                int(width * self.expansion) >= self.group_width,
                "model.widths",
                self.widths,
                f"width {width} times expansion {self.expansion} is less than one group of {self.group_width} channels",
            )
        for name in ("drop_rate", "stochdepth_rate"):
            rate = getattr(self, name)
            require(0 <= rate < 1, f"model.{name}", rate, "must lie in [0, 1)")
        for name in ("se_ratio", "expansion", "train_image_size", "test_image_size"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")


class NFNetBlock(nnx.Module):
    """Pre-activation bottleneck: 1x1, two grouped 3x3, 1x1, squeeze-excite; scaled by `alpha * skip_gain`."""

    def __init__(
        self,
        config: NFNetConfig,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        beta: float,
        drop_path_rate: float,
        index: int,
        rngs: AnyRngs,
    ) -> None:
        groups = int(out_channels * config.expansion) // config.group_width
        width = groups * config.group_width
        dtype = config.compute_dtype
        self.conv0 = WSConv(in_channels, width, 1, compute_dtype=dtype, rngs=rngs)
        self.conv1 = WSConv(width, width, 3, stride=stride, groups=groups, compute_dtype=dtype, rngs=rngs)
        self.conv1b = WSConv(width, width, 3, groups=groups, compute_dtype=dtype, rngs=rngs)
        self.conv2 = WSConv(width, out_channels, 1, compute_dtype=dtype, rngs=rngs)
        if stride > 1 or in_channels != out_channels:
            self.conv_shortcut = WSConv(in_channels, out_channels, 1, compute_dtype=dtype, rngs=rngs)
        self.squeeze_excite = SqueezeExcite(out_channels, config.se_ratio, compute_dtype=dtype, rngs=rngs)
        self.skip_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.has_projection = stride > 1 or in_channels != out_channels
        self.config = config
        self.stride = stride
        self.beta = beta
        self.drop_path_rate = drop_path_rate
        self.index = index
        self.deterministic = False

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """(N, H, W, I) -> (N, H / stride, W / stride, O); `keys` as for `NFNet`."""
        act = self.config.activation
        h = activate(act, x) * jnp.asarray(self.beta, x.dtype)
        shortcut = x
        if self.has_projection:
            shortcut = self.conv_shortcut(layers.avg_pool_2x2(h) if self.stride > 1 else h)
        h = self.conv0(h)
        h = self.conv1(activate(act, h))
        h = self.conv1b(activate(act, h))
        h = self.conv2(activate(act, h))
        h = 2 * self.squeeze_excite(h) * h
        if self.drop_path_rate > 0 and not self.deterministic:
            h = layers.drop_path(h, self.drop_path_rate, layers.layer_keys(keys, self.index))
        scale = self.skip_gain[...] * self.config.alpha
        return h * scale.astype(h.dtype) + shortcut


class NFNet(nnx.Module):
    """The network: stem, four stages, a final 1x1 convolution, mean pool, dropout, dense head.

    Call it in training mode (`model.train()`, the state after construction) or evaluation mode (`model.eval()`).
    """

    def __init__(self, config: NFNetConfig, *, num_classes: int, rngs: nnx.Rngs) -> None:
        dtype = config.compute_dtype
        init_rngs = InitRngs(rngs)
        channels, stem = 3, []
        for out, stride in zip((*_STEM_CHANNELS, config.widths[0] // 2), _STEM_STRIDES, strict=True):
            stem.append(WSConv(channels, out, 3, stride=stride, compute_dtype=dtype, rngs=init_rngs))
            channels = out
        self.stem = nnx.List(stem)

        num_blocks = sum(config.depths)
        stages: list[nnx.List] = []
        expected_std, index = 1.0, 0
        for width, depth, stage_stride in zip(config.widths, config.depths, _STAGE_STRIDES, strict=True):
            blocks = []
            for position in range(depth):
                blocks.append(
                    NFNetBlock(
                        config,
                        channels,
                        width,
                        stride=stage_stride if position == 0 else 1,
                        beta=1.0 / expected_std,
                        drop_path_rate=config.stochdepth_rate * index / num_blocks,
                        index=index,
                        rngs=init_rngs,
                    )
                )
                channels, index = width, index + 1
                # A stage's first block normalises its shortcut, too, so the variance starts anew there.
                expected_std = ((1.0 if position == 0 else expected_std**2) + config.alpha**2) ** 0.5
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)

        self.num_features = 2 * config.widths[-1]
        self.final_conv = WSConv(channels, self.num_features, 1, compute_dtype=dtype, rngs=init_rngs)
        head_init = nnx.initializers.normal(0.01)
        self.head = Dense(self.num_features, num_classes, kernel_init=head_init, compute_dtype=dtype, rngs=init_rngs)
        self.config = config
        self.num_blocks = num_blocks
        self.num_classes = num_classes
        self.deterministic = False

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Pooled features before dropout.

        Args:
          images: (N, H, W, 3) normalised images.
          keys: (N,) PRNG keys, one per example (`example_keys`); needed in training mode with stochastic depth.

        Returns:
          (N, num_features) float32.
        """
        act = self.config.activation
        x = images.astype(layers.DTYPES[self.config.compute_dtype])
        for position, conv in enumerate(self.stem):
            x = conv(x if position == 0 else activate(act, x))
        for blocks in self.stages:
            for block in blocks:
                x = block(x, keys)
        x = activate(act, self.final_conv(x))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Class logits.

        Args:
          images: (N, H, W, 3) normalised images.
          keys: (N,) PRNG keys, one per example; needed in training mode with dropout or stochastic depth.

        Returns:
          (N, num_classes) float32.

        Raises:
          ValueError: keys are needed and missing.
        """
        pooled = self.features(images, keys)
        if self.config.drop_rate > 0 and not self.deterministic:
            pooled = layers.dropout(pooled, self.config.drop_rate, layers.layer_keys(keys, self.num_blocks))
        return self.head(pooled).astype(jnp.float32)


def _variant(widths: tuple[int, ...], multiple: int, drop_rate: float, train: int, test: int) -> NFNetConfig:
    return NFNetConfig(
        widths=widths,
        depths=(multiple, 2 * multiple, 6 * multiple, 3 * multiple),
        drop_rate=drop_rate,
        train_image_size=train,
        test_image_size=test,
    )


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
VARIANTS: dict[str, NFNetConfig] = {
    f"nfnet_f{level}{suffix}": _variant(widths, *row)
    for suffix, widths in _WIDTHS.items()
    for level, row in enumerate(_TABLE)
}
