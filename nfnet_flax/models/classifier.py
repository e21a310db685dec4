"""The base class of all networks: runs the blocks, computes features, pool, dropout, dense head, signal statistics."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnet_flax.config import check_types, require
from nfnet_flax.models import layers
from nfnet_flax.models.config import GlobalPool, ModelConfig
from nfnet_flax.models.keys import check_example_keys
from nfnet_flax.models.layers import AnyRngs, ComputeDtype, Dense
from nfnet_flax.models.scopes import name_layers
from nfnet_flax.models.stages import Rematerialization, run_stage

HEAD_NORMAL = nnx.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What a residual block needs to know about its place in the network."""

    index: int
    """Number of the block among all blocks of the network, counted from 0."""
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
            # A stage's first block also normalises its shortcut, so the variance is reset there.
            expected_std = ((1.0 if position == 0 else expected_std**2) + alpha**2) ** 0.5
            index += 1
        specs.append(tuple(stage))
    return tuple(specs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a network is computed in training. It changes memory, speed and compile time, but not the network's
    function."""

    rematerialization: Rematerialization = "none"
    """What the backward pass computes again instead of storing it. `none`: nothing; `blocks`: the inside of each block;
    `full`: also the inputs of most blocks, so that for a stage of n blocks about 2 sqrt(n) of them are in memory at a
    time. The compiler for CPUs undoes it."""
    num_microbatches: int | None = 8
    """Number of equal parts (microbatches) into which the global batch is cut. Each device computes the same number of
    parts, one after the other, and their gradients are added (gradient accumulation); so it must be a multiple of the
    number of devices. None (only if `reproducible` is off): one part for each device; not possible with BatchNorm or
    SAM, which compute over a part, so that the number of devices would change the training."""
    reproducible: bool = True
    """Add the gradients of the parts in a fixed order: the same number of microbatches then gives the same bits on any
    number of devices. Off: in the fastest order; the results are equal up to rounding."""
    fsdp: int = 1
    """A setting of earlier versions, kept for their recipes and commands. It changes nothing, as the state is divided
    over the devices whatever it is. It must divide the number of devices."""
    spatial: int = 1
    """Number of neighbouring devices over which the height of each image is divided, for resolutions that do not fit on
    one device. Results with different values are equal up to rounding."""

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
    """A network with a stem, residual blocks, a last transformation, global pool, dropout and a dense head.

    Call it in training mode (`model.train()`, the mode after construction) or evaluation mode (`model.eval()`). A
    family's constructor calls `_add_blocks`, with blocks that map `(x, keys, spec)` to `(y, residual branch)`, and
    `_add_head`, after it has set `config`. Its methods `_stem` and `_final` compute what comes before and after the
    blocks.
    """

    stages: nnx.List
    head: Dense
    """Only if there are classes."""
    config: ModelConfig
    is_foldable: ClassVar[bool] = False
    """Whether `fold` can make an inference form of the network. Its blocks must be `NFBlock`s; and an activation in
    front of one of the `convolutions_after_scaling` must be scaled only if `is_folded` is not set."""

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
        self.num_features = num_features * (2 if self.config.global_pool == "catavgmax" else 1)
        if num_classes > 0:
            self.head = Dense(
                self.num_features, num_classes, kernel_init=kernel_init, compute_dtype=compute_dtype, rngs=rngs
            )
        self.num_classes = num_classes
        self.num_blocks = sum(map(len, self.specs))
        self.drop_rate = drop_rate
        self.compute_dtype: ComputeDtype = compute_dtype
        self.deterministic = False
        name_layers(self)

    def convolutions_after_scaling(self) -> list[nnx.Module]:
        """Convolutions outside of the blocks whose input is multiplied by the activation's gamma; `fold` multiplies
        their kernels by it."""
        return []

    def convolutions_before_norms(self) -> list[tuple[layers.Conv, layers.BatchNorm]]:
        """Convolutions whose output goes to one BatchNorm and nowhere else, each with that BatchNorm;
        `fold_batch_norms` multiplies their kernels by its factors."""
        return []

    def _stem(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _final(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def stem_output(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """What the first block gets, (N, h, w, channels) in `compute_dtype`; arguments and errors as for
        `feature_map`."""
        check_images(images, self.config.in_channels)
        check_example_keys(keys, images.shape[0])
        with jax.named_scope("stem"):
            return self._stem(images.astype(layers.DTYPES[self.compute_dtype]))

    def feature_map(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Features of every place of the images, before they are pooled.

        Args:
          images: (N, H, W, C) normalised images; C is `config.in_channels`.
          keys: (N,) PRNG keys, one per example (`example_keys`); needed in training mode with stochastic depth.

        Returns:
          (N, h, w, features) in `compute_dtype`.

        Raises:
          ConfigError: images have another shape or are integers, or there are more or fewer keys than images.
        """
        x = self.stem_output(images, keys)
        for number, (stage, specs) in enumerate(zip(self.stages, self.specs, strict=True)):
            x = run_stage(list(stage), x, keys, specs, self.execution.rematerialization, f"stage{number}")
        with jax.named_scope("final"):
            return self._final(x)

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Pooled features before dropout, (N, num_features) float32 (float64 under float64 compute); arguments and
        errors as for `feature_map`."""
        return _pooled(self.feature_map(images, keys), self.config.global_pool)

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Class logits, or the features of a network without classes.

        Args:
          images: (N, H, W, C) normalised images; C is `config.in_channels`.
          keys: (N,) PRNG keys, one per example; needed in training mode with dropout or stochastic depth.

        Returns:
          (N, num_classes) float32 (float64 under float64 compute); if num_classes is 0, (N, num_features).

        Raises:
          ValueError: keys are needed and missing.
          ConfigError: images have another shape or are integers, or there are more or fewer keys than images.
        """
        pooled = self.features(images, keys)
        if self.drop_rate > 0 and not self.deterministic:
            pooled = layers.dropout(pooled, self.drop_rate, layers.layer_keys(keys, self.num_blocks))
        logits = self.head(pooled) if self.num_classes > 0 else pooled
        return logits.astype(layers.statistics_dtype(logits.dtype))

    def signal_statistics(self, images: jax.Array, keys: jax.Array | None = None) -> dict[str, jax.Array]:
        """How the signal grows with depth (the "signal propagation plot" of arXiv 2101.08692, section 3).

        Args:
          images: (N, H, W, C) normalised images.
          keys: as for a call of the network.

        Returns:
          float32 arrays over depth: `avg_sq_mean` and `avg_var` (num_blocks + 1,), the squared mean and the variance of
          each channel averaged over the channels, after the stem and after each block; `res_avg_var` (num_blocks,), the
          same variance of each block's residual branch, before stochastic depth and skip gain.

        Raises:
          ConfigError: images have another shape or are integers, or there are more or fewer keys than images.
        """
        x = self.stem_output(images, keys)
        outputs, branches = [channel_moments(x)], []
        for stage, specs in zip(self.stages, self.specs, strict=True):
            for block, spec in zip(stage, specs, strict=True):
                x, branch = block(x, keys, spec)
                outputs.append(channel_moments(x))
                branches.append(channel_moments(branch)[1])
        return {
            "avg_sq_mean": jnp.stack([sq_mean for sq_mean, _ in outputs]),
            "avg_var": jnp.stack([variance for _, variance in outputs]),
            "res_avg_var": jnp.stack(branches),
        }


def channel_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The squared mean and the variance of each channel over examples and places, averaged over the channels.

    Args:
      x: (N, H, W, C) activations.

    Returns:
      Two scalars, float32 (float64 for float64 activations).
    """
    x = x.astype(layers.statistics_dtype(x.dtype))
    return jnp.mean(jnp.square(jnp.mean(x, axis=(0, 1, 2)))), jnp.mean(jnp.var(x, axis=(0, 1, 2)))


@jax.named_scope("pool")
def _pooled(x: jax.Array, pool: GlobalPool) -> jax.Array:
    """(N, H, W, C) -> (N, C), or (N, 2 C) for `catavgmax`."""
    wide = layers.statistics_dtype(x.dtype)
    if pool == "avg":
        return jnp.mean(x, axis=(1, 2), dtype=wide)
    highest = jnp.max(x, axis=(1, 2)).astype(wide)
    if pool == "max":
        return highest
    mean = jnp.mean(x, axis=(1, 2), dtype=wide)
    return 0.5 * (mean + highest) if pool == "avgmax" else jnp.concatenate([mean, highest], axis=-1)


def check_images(images: jax.Array, channels: int) -> None:
    """Raises `ConfigError` unless images are valid input of a network; only shape and type are checked."""
    remedy = f"give a jax.Array of (N, height, width, {channels})"
    require(isinstance(images, jax.Array | np.ndarray), "images", type(images).__name__, remedy)
    is_batch = images.ndim == 4 and images.shape[-1] == channels and min(images.shape[1:3]) >= 1
    hint = ": images[None] is a batch of one" if images.ndim == 3 and images.shape[-1] == channels else ""
    require(is_batch, "images.shape", images.shape, f"{remedy}{hint}")
    remedy = "grey levels must be normalised first, to floats: (images - mean) / std, with those of the recipe's data"
    require(jnp.issubdtype(images.dtype, jnp.floating), "images.dtype", str(images.dtype), remedy)
