"""Compares an exported network with the network that was trained, on random images."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.export.options import ExportedNetwork, ExportOptions
from nfnet_flax.models import Classifier
from nfnet_flax.models.params import merge, split

Call = Callable[[np.ndarray], np.ndarray]
"""An exported network: images of any batch size -> float32 results."""
BATCHES = (1, 3)
"""Sizes of the batches on which every export is compared."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far an exported network is from the trained one."""

    difference: float
    """Largest difference, as a share of the largest result; absolute if all results are zero."""
    tolerance: float
    """What it may be."""
    with_what: str
    """What computed the exported network."""

    def __str__(self) -> str:
        batches = " and ".join(map(str, BATCHES))
        return (
            f"compared with the trained network on random images, batches of {batches}, in {self.with_what}: largest "
            f"difference {self.difference:.1e} of the largest result (at most {self.tolerance:g} is allowed)"
        )


def compare(
    call: Call, exported: ExportedNetwork, options: ExportOptions, *, tolerance: float, with_what: str
) -> Comparison:
    """Compares an exported network with the trained one.

    Raises:
      ConfigError: results have another shape, are not finite, or differ by more than `tolerance`.
    """
    images = random_images(exported, options, sum(BATCHES))
    wanted = trained(exported)(normalised(images, exported, options))
    ends = np.cumsum(BATCHES)
    parts = [call(np.ascontiguousarray(images[end - size : end])) for size, end in zip(BATCHES, ends, strict=True)]
    got = np.concatenate(parts)
    if got.shape != wanted.shape:
        raise ConfigError(f"the export gives results of shape {got.shape} where the network gives {wanted.shape}")
    if not np.all(np.isfinite(wanted)):
        raise ConfigError("the network itself gives NaN or infinite results for random images: nothing was exported")
    comparison = Comparison(relative_difference(got, wanted), tolerance, with_what)
    if not comparison.difference <= tolerance:  # also if it is NaN
        too_small = ": float16 may be too small for its values, export float32" if options.dtype == "float16" else ""
        raise ConfigError(f"the export was removed; {comparison}{too_small}")
    return comparison


def relative_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, as a share of the largest wanted value; absolute if that is zero."""
    scale = float(np.max(np.abs(wanted))) or 1.0
    return float(np.max(np.abs(got.astype(np.float64) - wanted))) / scale


def random_images(exported: ExportedNetwork, options: ExportOptions, count: int) -> np.ndarray:
    """Random images as the exported network takes them, the same in every process."""
    rng, size, channels = np.random.default_rng(0), exported.image_size, exported.info.model.in_channels
    shape = (count, channels, size, size) if options.layout == "nchw" else (count, size, size, channels)
    if options.input == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


def normalised(images: np.ndarray, exported: ExportedNetwork, options: ExportOptions) -> np.ndarray:
    """Images for the trained network, (N, H, W, C) float32, from those for the exported one."""
    if options.layout == "nchw":
        images = images.transpose(0, 2, 3, 1)
    if options.input == "normalised":
        return images
    mean, std = exported.channel_statistics
    return (images.astype(np.float32) - mean) / std


def trained(exported: ExportedNetwork) -> Call:
    """The trained network in evaluation mode, neither folded nor exported."""
    return compiled_call(exported.network)


def compiled_call(network: Classifier) -> Call:
    """A network in evaluation mode, in JAX."""
    graphdef, params, batch_stats = split(network)
    compiled = jax.jit(lambda params, batch_stats, images: merge(graphdef, params, batch_stats)(images))
    return lambda images: np.asarray(compiled(params, batch_stats, jnp.asarray(images)))
