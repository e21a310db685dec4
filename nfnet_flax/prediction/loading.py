"""Makes a predictor of weights: of a run, a weight file, a folder, or a name in a model hub."""

import dataclasses
import os
import typing
from collections.abc import Sequence
from typing import Any

from nfnet_flax import runtime
from nfnet_flax.config import MAX_IMAGE_PX, ConfigError, require, require_one_of
from nfnet_flax.data.augment_config import Resampler
from nfnet_flax.models.folding import fold
from nfnet_flax.prediction.predictor import Predictor
from nfnet_flax.training.reading import Parameters, Which, weights_of
from nfnet_flax.weights import Preprocessing, WeightsInfo, network_of
from nfnet_flax.weights.portable import Activation

_NEEDED = ("image_size", "mean", "std")
"""Values without which images cannot be prepared."""
_AS_PUBLISHED: dict[str, Any] = {"crop_margin": 32, "resampler": "pillow_bicubic", "keeps_aspect": False}
"""The other values, for weights that do not say them."""


def load_predictor(
    weights: str | os.PathLike[str],
    *,
    parameters: Parameters = "ema",
    checkpoint: Which = "newest",
    batch_size: int = 32,
    activation: Activation | None = None,
    image_size: int | None = None,
    crop_margin: int | None = None,
    resampler: Resampler | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keeps_aspect: bool | None = None,
    field: str = "weights",
) -> Predictor:
    """A predictor with the network, the class names and the preprocessing of weights. A normalizer-free network is
    folded (`nfnet_flax.fold`).

    Args:
      weights: the folder of a run, which is not changed; a weight file; a folder with timm's `config.json` and
        `model.safetensors`; or a name in a model hub, such as `timm/eca_nfnet_l0.ra2_in1k`.
      parameters: for a run, "ema" for the moving average, or "raw" for the parameters as trained.
      checkpoint: for a run, which checkpoint; see `Run.weights`.
      batch_size: number of images that are computed at a time.
      activation: "softmax" if an image has one class, "sigmoid" if each class is independent of the others; None: as
        in training, and softmax for weights that do not say it.
      image_size: height and width of the network's images, in pixels; None, for this and the following arguments: as
        stored with the weights.
      crop_margin: total number of pixels that are cut off on each axis after resizing; 32 if it is not stored.
      resampler: method that resizes; "pillow_bicubic" if it is not stored.
      mean: value for each channel that is subtracted from the grey levels (0 to 255).
      std: value for each channel by which the grey levels are then divided.
      keeps_aspect: whether the shorter side is resized and the other one in proportion; False if it is not stored.
      field: name of `weights` in messages.

    Raises:
      ConfigError: there are no such weights, they are damaged or have no classes, an argument is not valid, or the
        preprocessing is neither stored nor given.
      StorageFailed: the folder of the run cannot be read.
      HubUnreachable: the model hub cannot be reached.
    """
    if activation is not None:
        require_one_of("activation", activation, typing.get_args(Activation))
    runtime.prepare()
    info, arrays = weights_of(weights, field=field, parameters=parameters, checkpoint=checkpoint)
    named = f"{field} {os.fspath(weights)!r}"
    if info.num_classes == 0:
        raise ConfigError(f"{named}: the network has no classes: nfnet_flax.load_model(file) makes one of features")
    if info.model.in_channels != 3:
        raise ConfigError(f"{named}: the network is for images of {info.model.in_channels} channels, not for RGB")
    given = {
        "image_size": image_size,
        "crop_margin": crop_margin,
        "resampler": resampler,
        "mean": _floats("mean", mean),
        "std": _floats("std", std),
        "keeps_aspect": keeps_aspect,
    }
    preprocessing = _preprocessing(named, info, {name: value for name, value in given.items() if value is not None})
    network = network_of(named, info, arrays)
    return Predictor(
        fold(network) if network.is_foldable else network,
        names=output_names(info),
        preprocessing=preprocessing,
        activation=activation or info.activation,
        source=info.source if info.parameters == "unknown" else f"{info.source}, {info.parameters} parameters",
        batch_size=batch_size,
    )


def output_names(info: WeightsInfo) -> tuple[str, ...]:
    """Names of all outputs of a network: those of the classes; numbers, if these are not known."""
    known = info.class_names
    if known is None:
        return tuple(map(str, range(info.num_classes)))
    return (*known, *(f"output {index} (no name)" for index in range(len(known), info.num_classes)))


def _floats(field: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    try:
        return None if values is None else tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field} = {values!r}: give three numbers, one for each channel") from error


def _preprocessing(named: str, info: WeightsInfo, given: dict[str, Any]) -> Preprocessing:
    """The stored preprocessing with the given changes."""
    if info.preprocessing is not None:
        found = dataclasses.replace(info.preprocessing, **given)
    elif missing := [name for name in _NEEDED if name not in given]:
        options = ", ".join(f"{name} (--{name.replace('_', '-')})" for name in missing)
        raise ConfigError(
            f"{named} do not say how images were prepared: give {options}; the published networks have --mean 123.675 "
            "116.28 103.53 --std 58.395 57.12 57.375, and the image size that `nfnet models` lists under test px"
        )
    else:
        found = Preprocessing(**{**_AS_PUBLISHED, **given})
    remedy = f"must be at least 1, and with crop_margin at most {MAX_IMAGE_PX:,}"
    require(1 <= found.image_size <= MAX_IMAGE_PX - found.crop_margin, "image_size", found.image_size, remedy)
    require(found.crop_margin >= 0, "crop_margin", found.crop_margin, "must not be negative")
    require(min(found.std) > 0, "std", found.std, "must be positive")
    require_one_of("resampler", found.resampler, typing.get_args(Resampler))
    return found
