"""How the signal grows with the depth of a network: the signal propagation plots of arXiv 2101.08692, section 3.

The network computes as it always does. It is run one block at a time, so that the memory needed besides its parameters
is that of one block, and the blocks of a stage, which differ only in their arrays, are compiled once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError, require, require_count
from nfnet_flax.models import Classifier
from nfnet_flax.models.classifier import BlockSpec, channel_moments
from nfnet_flax.models.keys import check_seed
from nfnet_flax.models.layers import BatchNorm
from nfnet_flax.models.nf_block import NFBlock
from nfnet_flax.models.timm_nfnet import TimmNFBlock
from nfnet_flax.progress import COMPUTING_LINE_S, track

Normalization = Literal["none", "batch", "running"]
"""With which statistics BatchNorm normalises: the network has none; those of the batch; the running ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSignal:
    """The signal at one residual block."""

    name: str
    """Beginning of the names of the block's parameters, such as `stages.2.0`."""
    stage: int
    """Number of its stage, counted from 0."""
    avg_sq_mean: float
    """Squared mean of each channel of the block's output, after the addition, averaged over the channels."""
    avg_var: float
    """Variance of each channel of the block's output, averaged over the channels."""
    res_avg_var: float
    """Variance of each channel at the end of the residual branch, averaged over the channels; before stochastic depth,
    alpha and the skip gain."""
    beta: float
    """Factor on the block's input: 1 / its expected standard deviation; 1 in networks with BatchNorm."""
    branch_factor: float
    """By what the branch is multiplied before it is added: alpha times the skip gain; 1 in networks with BatchNorm."""
    expected_var: float | None
    """Closed form of `avg_var`, see `expected_variances`; None for a network that is not normalizer-free."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignalPropagation:
    """The published signal metrics of a network over its depth."""

    stem_sq_mean: float
    """`avg_sq_mean` of the output of the stem, which is the input of the first block."""
    stem_var: float
    """`avg_var` of it."""
    blocks: tuple[BlockSignal, ...]
    """One for each block, in the order of the network."""
    num_images: int
    """Number of images over which the moments are taken."""
    image_size: tuple[int, int]
    """Their height and width, in pixels."""
    batch_norm: Normalization
    """With which statistics BatchNorm normalised."""
    pools_in_shortcuts: bool
    """Whether shortcuts average 2 x 2 places. The variance of noise, whose neighbouring places are nearly independent,
    falls to about a quarter there; the closed form leaves this out."""

    @property
    def first_not_finite(self) -> str | None:
        """Name of the first part of the network whose output is not finite; None: all are."""
        if not (math.isfinite(self.stem_sq_mean) and math.isfinite(self.stem_var)):
            return "stem"
        for block in self.blocks:
            if not all(map(math.isfinite, (block.avg_sq_mean, block.avg_var, block.res_avg_var))):
                return block.name
        return None


def unit_noise(num_images: int, image_size: int, *, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Independent Gaussian values of mean 0 and variance 1, (num_images, image_size, image_size, channels) float32: the
    input of the published plots.

    Raises:
      ConfigError: a number is less than 1, or the seed is not in [0, 2**32).
    """
    for name, value in (("num_images", num_images), ("image_size", image_size), ("channels", channels)):
        require_count(name, value)
    check_seed("seed", seed)
    shape = num_images, image_size, image_size, channels
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def signal_propagation(
    model: Classifier,
    images: jax.Array | np.ndarray,
    *,
    skip_gain: float | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> SignalPropagation:
    """Measures the published signal metrics of a network, which is not changed; without dropout and stochastic depth.

    BatchNorm normalises with the running statistics, or with those of the images if the running ones were never
    updated, that is, at initialisation.

    Args:
      model: the network, as `create_model`, `Run.model` or `load_model` make it.
      images: (N, H, W, C) normalised images, or `unit_noise`.
      skip_gain: value that all skip gains get for the measurement; None: they are used as they are. At initialisation
        they are 0, so that the branches do not count. In timm's networks, which have no skip gain, it is the value of
        the gains of each block's last convolution.
      on_block: is called after each block with the number of blocks that are done, and of all.

    Raises:
      ConfigError: the network is folded, it has no skip gains to set, the value is not finite, or the images are not
        its input.
    """
    require(isinstance(model, Classifier), "model", model, "give a network, such as nfnet_flax.create_model makes")
    if model.is_folded:
        raise ConfigError("signal_propagation: the network is folded: give it as create_model or load_model make it")
    model = nnx.clone(model)
    model.eval()
    batch_norm = _choose_statistics(model)
    blocks = [block for stage in model.stages for block in stage]
    if skip_gain is not None:
        require(math.isfinite(skip_gain), "skip_gain", skip_gain, "must be finite")
        require(has_skip_gains(model), "skip_gain", skip_gain, "the network has no skip gains: leave it out")
        for block in blocks:
            _set_skip_gain(block, skip_gain)
    x, stem = _stem(*nnx.split(model), jnp.asarray(images))
    stem_sq_mean, stem_var = map(float, stem)
    found: list[BlockSignal] = []
    expected = expected_variances(model)
    stages = list(zip(model.stages, model.specs, strict=True))
    shown = track(stages, "measuring the signal", "stages", first_line_s=COMPUTING_LINE_S)
    for stage, (row, specs) in enumerate(shown):
        for position, (block, spec) in enumerate(zip(row, specs, strict=True)):
            x, moments = _block(block, x, spec)
            avg_sq_mean, avg_var, res_avg_var = map(float, moments)
            found.append(
                BlockSignal(
                    name=f"stages.{stage}.{position}",
                    stage=stage,
                    avg_sq_mean=avg_sq_mean,
                    avg_var=avg_var,
                    res_avg_var=res_avg_var,
                    beta=spec.beta,
                    branch_factor=_branch_factor(block),
                    expected_var=None if expected is None else expected[len(found)],
                )
            )
            if on_block is not None:
                on_block(len(found), len(blocks))
    return SignalPropagation(
        stem_sq_mean=stem_sq_mean,
        stem_var=stem_var,
        blocks=tuple(found),
        num_images=images.shape[0],
        image_size=(images.shape[1], images.shape[2]),
        batch_norm=batch_norm,
        pools_in_shortcuts=any(isinstance(block, NFBlock) and block.pools for block in blocks),
    )


def expected_variances(model: Classifier) -> list[float] | None:
    """Closed form of the variance after each block of a normalizer-free network; None for any other network.

    It is what the network's own factors beta assume: a branch has variance 1 and adds `alpha**2`; the shortcut has the
    variance of the block's input, `1 / beta**2`, or 1 in the first block of a stage, a transition block, whose
    shortcut is made of the normalised input. Skip gains are 1.
    """
    found = []
    for row, specs in zip(model.stages, model.specs, strict=True):
        for position, (block, spec) in enumerate(zip(row, specs, strict=True)):
            if not isinstance(block, NFBlock):
                return None
            found.append((1.0 if position == 0 else spec.beta**-2) + block.alpha**2)
    return found


def has_skip_gains(model: Classifier) -> bool:
    """Whether blocks of a network have a skip gain, or the gains that take its place in timm's networks."""
    blocks = (block for stage in model.stages for block in stage)
    return any(
        isinstance(block, NFBlock) and (block.has_skip_gain or isinstance(block, TimmNFBlock)) for block in blocks
    )


def _set_skip_gain(block: nnx.Module, value: float) -> None:
    if isinstance(block, NFBlock) and block.has_skip_gain:
        block.skip_gain = nnx.Param(jnp.full((), value, jnp.float32))
    elif isinstance(block, TimmNFBlock):
        block.conv2.gain = nnx.Param(jnp.full(block.conv2.gain.shape, value, jnp.float32))


def _branch_factor(block: nnx.Module) -> float:
    if not isinstance(block, NFBlock):
        return 1.0
    return block.alpha * (float(block.skip_gain[...]) if block.has_skip_gain else 1.0)


def _choose_statistics(model: Classifier) -> Normalization:
    """Makes BatchNorm use the statistics of the batch if the running ones were never updated."""
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm) and not module.is_folded]
    if not norms:
        return "none"
    if any(int(norm.count[...]) > 0 for norm in norms):
        return "running"
    for norm in norms:
        norm.deterministic = False
    return "batch"


@functools.partial(jax.jit, static_argnums=0)
def _stem(structure: Any, state: nnx.State, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The output of the stem, and its moments."""
    model: Classifier = nnx.merge(structure, state)
    x = model.stem_output(images)
    return x, channel_moments(x)


_Measured = tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]
"""The output of a block, its two moments, and the variance of the branch."""


def _block(block: nnx.Module, x: jax.Array, spec: BlockSpec) -> _Measured:
    structure, state = nnx.split(block)
    try:
        return _with_any_spec(structure, state, x, dataclasses.asdict(spec))
    except jax.errors.JAXTypeError:  # a block of a user's own, which looks at these numbers while it is traced
        return _with_this_spec(structure, spec, state, x)


@functools.partial(jax.jit, static_argnums=0)
def _with_any_spec(structure: Any, state: nnx.State, x: jax.Array, spec: dict[str, Any]) -> _Measured:
    """Compiled once for all blocks of one structure."""
    return _measured(nnx.merge(structure, state), x, BlockSpec(**spec))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_this_spec(structure: Any, spec: BlockSpec, state: nnx.State, x: jax.Array) -> _Measured:
    return _measured(nnx.merge(structure, state), x, spec)


def _measured(block: Any, x: jax.Array, spec: BlockSpec) -> _Measured:
    y, branch = block(x, None, spec)
    return y, (*channel_moments(y), channel_moments(branch)[1])
