"""What to export, and how: the options of `nfnet export`, checked, and the network with its facts."""

import dataclasses
import importlib.util
from typing import Literal

import jax.numpy as jnp
import numpy as np

from nfnet_flax.config import MAX_IMAGE_PX, ConfigError, check_types, require
from nfnet_flax.models import IMAGE_SIZES, Classifier
from nfnet_flax.models.folding import fold, fold_batch_norms
from nfnet_flax.models.registry import VARIANTS
from nfnet_flax.weights import network_of
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import WeightsInfo

Target = Literal["stablehlo", "onnx", "safetensors"]
InputName = Literal["normalised", "uint8"]
LayoutName = Literal["nhwc", "nchw"]
StoredDtype = Literal["float32", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a network is exported."""

    to: Target
    """Format of the result."""
    image_size: int | None = None
    """Height and width of the images, in pixels; None: those of the evaluation that the weights record."""
    input: InputName = "normalised"
    """What the images are: normalised floats, as `nfnet_flax.preprocess` makes them; or grey levels from 0 to 255
    (uint8), which the exported network normalises itself."""
    layout: LayoutName = "nhwc"
    """Order of the axes of the images: (N, H, W, C), or (N, C, H, W), which only ONNX offers."""
    dtype: StoredDtype = "float32"
    """Type of the weights. ONNX also computes in it; StableHLO computes in float32. Results are float32."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.image_size is not None:
            remedy = f"must be at least 1 and at most {MAX_IMAGE_PX:,}"
            require(1 <= self.image_size <= MAX_IMAGE_PX, "image_size", self.image_size, remedy)
        if self.to != "onnx":
            require(self.layout == "nhwc", "layout", self.layout, f"is for ONNX; {self.to} takes (N, H, W, C)")
        if self.to == "safetensors":
            remedy = "weights alone take no images; leave it out, or export to onnx or stablehlo"
            require(self.input == "normalised", "input", self.input, remedy)


@dataclasses.dataclass(frozen=True)
class ExportedNetwork:
    """A network that is exported. It computes in float32, whatever type it was trained in."""

    info: WeightsInfo
    """Description of the weights."""
    network: Classifier
    """As it was trained, in evaluation mode."""
    folded: Classifier
    """Its inference form: plain convolutions."""
    image_size: int
    """Height and width of the images, in pixels."""

    @property
    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """See `_channel_statistics`."""
        return _channel_statistics(self.info)


def _channel_statistics(info: WeightsInfo) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the grey levels of each channel, (C,) float32.

    Raises:
      ConfigError: they are not recorded.
    """
    found, channels = info.preprocessing, info.model.in_channels
    if found is None or len(found.mean) != channels:
        raise ConfigError(
            f"input = 'uint8': the weights record no mean and standard deviation of {channels} channels: export for "
            "normalised images (input = 'normalised')"
        )
    return np.asarray(found.mean, np.float32), np.asarray(found.std, np.float32)


def network_for(source: str, info: WeightsInfo, arrays: HostArrays, options: ExportOptions) -> ExportedNetwork:
    """The network of given weights, as trained and folded.

    Args:
      source: description of where the weights come from, for the message of an error.
      info: description of the weights.
      arrays: our name -> array.
      options: how it is exported.

    Raises:
      ConfigError: the arrays do not fit, or the size or the normalisation of the images is needed and not known.
    """
    image_size = options.image_size
    if image_size is None:
        if info.preprocessing is None:
            raise ConfigError(f"image_size: {source} records no preprocessing: give the size{_hint(info)}")
        image_size = info.preprocessing.image_size
    if options.input == "uint8":
        _channel_statistics(info)
    info = dataclasses.replace(info, model=dataclasses.replace(info.model, compute_dtype="float32"))
    network = network_of(source, info, arrays)
    folded = fold(network) if network.is_foldable else fold_batch_norms(network)
    return ExportedNetwork(info, network, folded, image_size)


def _hint(info: WeightsInfo) -> str:
    """The published size, if the configuration is that of a named network."""
    config = dataclasses.replace(info.model, compute_dtype="float32")
    name = next((name for name, known in VARIANTS.items() if known == config), None)
    return "" if name is None else f"; {name} was published with images of {IMAGE_SIZES[name].test} px"


def check_installed(*packages: str) -> None:
    """Raises `ConfigError` unless packages of the extra `export` are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"this export needs the package {package}: pip install 'nfnet_flax[export]'")


def rounded_arrays(arrays: HostArrays, dtype: StoredDtype) -> HostArrays:
    """Arrays in the type in which they are stored; empty ones, which folding leaves, are left out."""
    return {name: np.asarray(jnp.asarray(value, dtype)) for name, value in arrays.items() if value.size}
