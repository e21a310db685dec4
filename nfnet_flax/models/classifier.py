"""What every network shares: blocks and how they are run, features, pool, dropout, dense head, signal statistics."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnet_flax.config import check_types, require
from nfnet_flax.models import layers
from nfnet_flax.models.config import ModelConfig
from nfnet_flax.models.keys import check_example_keys
from nfnet_flax.models.layers import AnyRngs, ComputeDtype, Dense
from nfnet_flax.models.stages import Rematerialization, run_stage

HEAD_NORMAL = nnx.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What a residual block needs to know of its place in the network."""

    index: int
    """Of all blocks, from 0."""
    beta: float
    """1 / expected standard deviation of the block's input; 1 in networks with BatchNorm."""
    drop_path_rate: float
    """Stochastic depth: probability that the branch is dropped for an example."""


def block_specs(depths: Sequence[int], *, alpha: float, stochdepth_rate: float) -> tuple[tuple[BlockSpec, ...], ...]:
    """The blocks of each stage, with variance-preserving constants for branches of unit variance times `alpha`."""
    specs: list[tuple[BlockSpec, ...]] = []
    expected_std, index = 1.0, 0
    for depth in depths:
        stage = []
        for position in range(depth):
            stage.append(BlockSpec(index, 1.0 / expected_std, stochdepth_rate * index / sum(depths)))
            # A stage's first block normalises its shortcut, too, so the variance starts anew there.
            expected_std = ((1.0 if position == 0 else expected_std**2) + alpha**2) ** 0.5
            index += 1
        specs.append(tuple(stage))
    return tuple(specs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a network is computed in training: memory, speed and compile time, but not which function it is."""

    rematerialization: Rematerialization = "none"
    """What the backward pass computes again instead of keeping: nothing; the inside of each block; or also the inputs
    of most blocks: of n blocks of a stage it holds about 2 sqrt(n) at a time. CPUs' compiler undoes all of it."""
    num_microbatches: int | None = 8
    """Equal parts into which the global batch is cut, and whose gradients are added (gradient accumulation). Each
    device takes equally many of them, one after the other, so their number is a multiple of the number of devices.
    None, where `reproducible` is off: one for each device; not with BatchNorm or SAM, which compute over parts, so that
    another number of devices would be another training."""
    reproducible: bool = True
    """Add the parts in a fixed order: the same number of microbatches then gives the same bits on any number of
    devices. Off: sums in whatever order is fastest; equal to rounding, not to the bit."""
    fsdp: int = 1
    """Number of devices over which kernels, momentum and EMA are divided, gathered for each step; divides the number of
    devices."""
    spatial: int = 1
    """Number of neighbouring devices that share the images they compute, each a part of the height: for resolutions
    that do not fit one. Equal to rounding, not to the bit, to any other number."""

    def __post_init__(self) -> None:
        check_types(self)
        parts = self.num_microbatches
        require(parts is None or parts >= 1, "execution.num_microbatches", parts, "must be at least 1, or None")
        require(self.fsdp >= 1, "execution.fsdp", self.fsdp, "must be at least 1")
        require(self.spatial >= 1, "execution.spatial", self.spatial, "must be at least 1")
        if self.reproducible:
            remedy = "must be a power of two, or turn execution.reproducible off"
            require(parts is not None and parts & (parts - 1) == 0, "execution.num_microbatches", parts, remedy)


class Classifier(nnx.Module):
    """Stem, residual blocks, a last transformation, mean pool, dropout, dense head.

    Call it in training mode (`model.train()`, the state after construction) or evaluation mode (`model.eval()`). A
    family sets `stages` (lists of blocks that map `(x, keys, spec)` to `(y, residual branch)`), calls `_add_head`, and
    says what comes before and after the blocks in `_stem` and `_final`.
    """

    stages: nnx.List
    config: ModelConfig
    is_foldable: ClassVar[bool] = False
    """Whether `fold` can make an inference form of it: of what is made of `NFBlock`s, and in which every activation
    outside of them is scaled where `is_folded` is not set (`convolutions_after_activations`)."""

    def _add_blocks(
        self,
        make_block: Callable[[int, int], nnx.Module],
        specs: tuple[tuple[BlockSpec, ...], ...],
    ) -> None:
        """Builds `make_block(stage, position)` for every block."""
        self.stages = nnx.List(
            [nnx.List([make_block(stage, position) for position in range(len(row))]) for stage, row in enumerate(specs)]
        )
        self.specs = specs
        self.is_folded = False
        self.execution = ExecutionConfig()

    def _add_head(
        self,
        num_features: int,
        num_classes: int,
        *,
        kernel_init: nnx.Initializer,
        drop_rate: float,
        compute_dtype: ComputeDtype,
        rngs: AnyRngs,
    ) -> None:
        self.head = Dense(num_features, num_classes, kernel_init=kernel_init, compute_dtype=compute_dtype, rngs=rngs)
        self.num_features = num_features
        self.num_classes = num_classes
        self.num_blocks = sum(map(len, self.specs))
        self.drop_rate = drop_rate
        self.compute_dtype: ComputeDtype = compute_dtype
        self.deterministic = False

    def convolutions_after_activations(self) -> list[nnx.Module]:
        """Convolutions outside of the blocks whose input is a scaled activation (`fold` takes the scale into them)."""
        return []

    def _stem(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _final(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _begin(self, images: jax.Array, keys: jax.Array | None) -> jax.Array:
        """What the stem gives, of images and keys that are looked at first."""
        check_images(images)
        check_example_keys(keys, len(images))
        return self._stem(images.astype(layers.DTYPES[self.compute_dtype]))

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Pooled features before dropout.

        Args:
          images: (N, H, W, 3) normalised images.
          keys: (N,) PRNG keys, one per example (`example_keys`); needed in training mode with stochastic depth.

        Returns:
          (N, num_features) float32 (float64 under float64 compute).

        Raises:
          ConfigError: images are of another shape or integers, or there are more or fewer keys than images.
        """
        x = self._begin(images, keys)
        for stage, specs in zip(self.stages, self.specs, strict=True):
            x = run_stage(list(stage), x, keys, specs, self.execution.rematerialization)
        x = self._final(x)
        return jnp.mean(x, axis=(1, 2), dtype=layers.statistics_dtype(x.dtype))

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Class logits.

        Args:
          images: (N, H, W, 3) normalised images.
          keys: (N,) PRNG keys, one per example; needed in training mode with dropout or stochastic depth.

        Returns:
          (N, num_classes) float32 (float64 under float64 compute).

        Raises:
          ValueError: keys are needed and missing.
          ConfigError: images are of another shape or integers, or there are more or fewer keys than images.
        """
        pooled = self.features(images, keys)
        if self.drop_rate > 0 and not self.deterministic:
            pooled = layers.dropout(pooled, self.drop_rate, layers.layer_keys(keys, self.num_blocks))
        logits = self.head(pooled)
        return logits.astype(layers.statistics_dtype(logits.dtype))

    def signal_statistics(self, images: jax.Array, keys: jax.Array | None = None) -> dict[str, jax.Array]:
        """How the signal grows with depth (the "signal propagation plot" of arXiv 2101.08692, section 3).

        Args:
          images: (N, H, W, 3) normalised images.
          keys: as for a call.

        Returns:
          float32 arrays over depth: `avg_sq_mean` and `avg_var` (num_blocks + 1,), the squared mean and the variance of
          each channel averaged over the channels, after the stem and after each block; `res_avg_var` (num_blocks,), the
          same variance of each block's residual branch, before stochastic depth and skip gain.

        Raises:
          ConfigError: images are of another shape or integers, or there are more or fewer keys than images.
        """
        x = self._begin(images, keys)
        outputs, branches = [x], []
        for stage, specs in zip(self.stages, self.specs, strict=True):
            for block, spec in zip(stage, specs, strict=True):
                x, branch = block(x, keys, spec)
                outputs.append(x)
                branches.append(branch)
        wide = layers.statistics_dtype(x.dtype)
        outputs, branches = ([x.astype(wide) for x in tensors] for tensors in (outputs, branches))
        return {
            "avg_sq_mean": jnp.stack([jnp.mean(jnp.square(jnp.mean(x, axis=(0, 1, 2)))) for x in outputs]),
            "avg_var": jnp.stack([jnp.mean(jnp.var(x, axis=(0, 1, 2))) for x in outputs]),
            "res_avg_var": jnp.stack([jnp.mean(jnp.var(x, axis=(0, 1, 2))) for x in branches]),
        }


def check_images(images: jax.Array) -> None:
    """Raises `ConfigError` unless a network can be given these images; looks at their shape and type alone."""
    remedy = "give a jax.Array of (N, height, width, 3)"
    require(isinstance(images, jax.Array | np.ndarray), "images", type(images).__name__, remedy)
    is_batch = images.ndim == 4 and images.shape[-1] == 3 and min(images.shape[1:3]) >= 1
    hint = ": images[None] is a batch of one" if images.ndim == 3 and images.shape[-1] == 3 else ""
    require(is_batch, "images.shape", images.shape, f"{remedy}{hint}")
    remedy = "grey levels must be normalised first, to floats: (images - mean) / std, with those of the recipe's data"
    require(jnp.issubdtype(images.dtype, jnp.floating), "images.dtype", str(images.dtype), remedy)
