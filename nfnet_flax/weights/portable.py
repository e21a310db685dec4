"""Our own weight files: safetensors with arrays under our names, and metadata that describe them."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Literal

from nfnet_flax.config import ConfigError, check_types, require
from nfnet_flax.config_json import ADDED_LATER, CodeNotLoaded, differences, from_json, to_json
from nfnet_flax.models import Classifier, ModelConfig
from nfnet_flax.models.params import update
from nfnet_flax.paths import local_path
from nfnet_flax.weights.entries import Entry, HostArrays, arrays_of, read_entries, shapes_of, skipped, with_channels
from nfnet_flax.weights.files import read_safetensors, write_safetensors

_FORMAT = "nfnet_flax weights 1"
# These fields change how a network is trained or computed, but not the function that its parameters define.
FREE_FIELDS = ("drop_rate", "stochdepth_rate", "compute_dtype")
ParameterKind = Literal["raw", "ema", "unknown"]
Activation = Literal["softmax", "sigmoid"]
"""Function that makes probabilities of logits: `softmax` if an image has one class, `sigmoid` if each class is
independent of the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images were prepared for the evaluation of a network; the values are those of `DataConfig`."""

    image_size: int
    """Height and width of the network's images, in pixels."""
    crop_margin: int
    """Total number of pixels that are cut off on each axis after resizing."""
    resampler: str
    """Method that resizes the images."""
    mean: tuple[float, float, float]
    """Mean that is subtracted from the grey levels (0 to 255) of each channel."""
    std: tuple[float, float, float]
    """Standard deviation by which the grey levels of each channel are then divided."""
    keeps_aspect: bool = dataclasses.field(default=False, metadata=ADDED_LATER)
    """Whether the shorter side is resized to `image_size + crop_margin` and the other one in proportion; False: both
    sides to the same length."""

    def __post_init__(self) -> None:
        check_types(self)

    def normalisation_change(self, source: str, mean: Sequence[float], std: Sequence[float]) -> str | None:
        """A message if images shall be normalised differently; None if they are normalised in the same way.

        With another normalization a network gets other values for the same image. The image size is not compared,
        because another size is usual; nor is the resampler, because resamplers differ by less than a grey level.

        Args:
          source: what this preprocessing belongs to, for the message.
          mean: the requested mean.
          std: the requested standard deviation.
        """
        asked = {"mean": tuple(mean), "std": tuple(std)}
        changed = [
            f"{name} {getattr(self, name)} -> {value}" for name, value in asked.items() if getattr(self, name) != value
        ]
        if not changed:
            return None
        return (
            f"{source}: preprocessing: stored -> asked for: {', '.join(changed)}: the network will get other values "
            "than in its training; to avoid this, give data.mean and data.std as stored"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """The description of weights in the metadata of a weight file."""

    model: ModelConfig
    """Configuration of the network."""
    num_classes: int
    """Number of outputs of its head; 0: it has none."""
    source: str
    """Description of where the weights come from."""
    parameters: ParameterKind
    """Which parameters they are: as trained, their moving average, or unknown."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes of the first outputs of the head, in order; None: not known."""
    preprocessing: Preprocessing | None = None
    """Preprocessing of the images; None: not known."""
    activation: Activation = "softmax"
    """Function that makes probabilities of the logits. Files of earlier versions and of other projects do not say it;
    they are taken for networks with one class per image."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.num_classes >= 0, "num_classes", self.num_classes, "must not be negative")
        if self.class_names is not None:
            names, num_names = set(self.class_names), len(self.class_names)
            remedy = f"must not be more than num_classes = {self.num_classes}, and all different"
            require(len(names) == num_names <= self.num_classes, "class_names", self.class_names, remedy)


def save_weights(
    path: str | os.PathLike[str],
    model: Classifier,
    *,
    source: str,
    parameters: ParameterKind,
    class_names: tuple[str, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a network's arrays; see `write_weights` and `WeightsInfo`."""
    info = WeightsInfo(
        model=model.config,
        num_classes=model.num_classes,
        source=source,
        parameters=parameters,
        class_names=class_names,
        preprocessing=preprocessing,
    )
    write_weights(path, info, arrays_of(model), overwrite=overwrite)


def write_weights(
    path: str | os.PathLike[str], info: WeightsInfo, arrays: HostArrays, *, overwrite: bool = False
) -> None:
    """Writes arrays under our names; the file gets its name only when it is complete.

    Raises:
      ConfigError: the file cannot be written, or exists and must not be replaced (`overwrite`).
    """
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(to_json(info.model)),
        "num_classes": str(info.num_classes),
        "source": info.source,
        "parameters": info.parameters,
    }
    if info.class_names is not None:
        metadata["class_names"] = json.dumps(info.class_names)
    if info.preprocessing is not None:
        metadata["preprocessing"] = json.dumps(to_json(info.preprocessing))
    if info.activation != "softmax":  # what earlier versions did not write
        metadata["activation"] = info.activation
    write_safetensors(local_path("weights file", path), arrays, metadata, overwrite=overwrite)


def read_weights(path: str | os.PathLike[str]) -> tuple[WeightsInfo, HostArrays]:
    """Reads a file that `save_weights` wrote.

    Raises:
      CodeNotLoaded: the network belongs to a family of a user's own, whose code is not loaded.
      ConfigError: the file cannot be read, is damaged, or was written by something else.
    """
    tensors, metadata = read_safetensors(local_path("weights file", path))
    named = f"weights file {str(path)!r}"
    if metadata.get("to") == "safetensors":
        raise ConfigError(
            f"{named} holds folded weights, which cannot be trained: nfnet_flax.export.load_folded makes the network, "
            "or give the file from which `nfnet export` made it"
        )
    if metadata.get("format") != _FORMAT:
        raise ConfigError(f"{named} was not written by nfnet_flax: convert it with `nfnet convert timm`")
    try:
        info = _info(metadata)
    except KeyError as error:
        raise ConfigError(f"{named}: its metadata lack {error}: take the file from where it was written") from error
    except CodeNotLoaded as error:
        raise CodeNotLoaded(f"{named}: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:  # raised by JSON, numbers and our own checks
        raise ConfigError(f"{named}: its metadata are wrong: {error}") from error
    # Checked here because a network is built from the metadata before its arrays are checked.
    if (num_blocks := info.model.num_blocks) > len(tensors):
        raise ConfigError(f"{named}: its metadata name {num_blocks} blocks, but it holds {len(tensors)} arrays")
    return info, tensors


def _info(metadata: dict[str, str]) -> WeightsInfo:
    names, preprocessing = (metadata.get(name) for name in ("class_names", "preprocessing"))
    return WeightsInfo(
        model=from_json(ModelConfig, json.loads(metadata["model"]), "model"),
        num_classes=int(metadata["num_classes"]),
        source=metadata["source"],
        parameters=metadata["parameters"],  # type: ignore[arg-type]
        class_names=None if names is None else tuple(json.loads(names)),
        preprocessing=None
        if preprocessing is None
        else from_json(Preprocessing, json.loads(preprocessing), "preprocessing"),
        activation=metadata.get("activation", "softmax"),  # type: ignore[arg-type]
    )


def stored_arrays(path: str | os.PathLike[str], model: Classifier, *, skip: Sequence[str] = ()) -> HostArrays:
    """Arrays of a weight file for a network, which may be abstract (`nnx.eval_shape`); they are only checked, not
    loaded.

    Args:
      path: a file that `save_weights` wrote.
      model: the network.
      skip: shell-style patterns of names that are left out, such as `head.*` for a head of another size.

    Raises:
      ConfigError: the file cannot be read, belongs to another network, or does not fit.
    """
    info, tensors = read_weights(path)
    return fitting_arrays(f"weights file {str(path)!r}", info, tensors, model, skip)


def fitting_arrays(
    source: str, info: WeightsInfo, arrays: HostArrays, model: Classifier, skip: Sequence[str] = ()
) -> HostArrays:
    """Arrays under our names, checked against a network, which may be abstract (`nnx.eval_shape`).

    A head is left out for a network without one; for images of another number of channels than 3, see `with_channels`.

    Args:
      source: description of where the arrays come from, for the message of an error.
      info: description of the weights.
      arrays: our name -> array.
      model: the network for which they are needed.
      skip: shell-style patterns of names that are left out.

    Raises:
      ConfigError: they belong to another network, or do not fit.
    """
    if model.num_classes == 0 < info.num_classes:
        arrays = {name: value for name, value in arrays.items() if not name.startswith("head.")}
        info = dataclasses.replace(info, num_classes=0, class_names=None)
    channels = model.config.in_channels
    if info.model.in_channels == 3 != channels:
        arrays = with_channels(arrays, {name: shape for name, (shape, _) in shapes_of(model).items()})
        info = dataclasses.replace(info, model=dataclasses.replace(info.model, in_channels=channels))
    lines = [
        line
        for line in differences(to_json(info.model), to_json(model.config))
        if line.split(":")[0] not in FREE_FIELDS
    ]
    if type(info.model) is not type(model.config):
        lines = [f"family: {type(info.model).__name__} -> {type(model.config).__name__}"]
    if lines:
        raise ConfigError(
            f"{source} is of another network (stored -> asked for):\n"
            + "".join(f"  {line}\n" for line in lines)
            + "ask for the stored one, or take the network from the file: nfnet_flax.load_model(file)"
        )
    entries = [Entry(name, name, shape) for name, (shape, _) in shapes_of(model).items()]
    names = [entry.ours for entry in entries]
    head = {name for name in names if name.startswith("head.")}
    if info.num_classes != model.num_classes and not head <= skipped(names, skip):
        raise ConfigError(
            f"{source} has a head of {info.num_classes} classes, not {model.num_classes}: ask for "
            f"num_classes = {info.num_classes}, or leave the stored head out by the pattern 'head.*'"
        )
    return read_entries(source, model, entries, arrays, skip)


def load_weights(model: Classifier, path: str | os.PathLike[str], *, skip: Sequence[str] = ()) -> None:
    """Replaces a network's arrays by those of a weight file, in place; see `stored_arrays`."""
    update(model, dict(stored_arrays(path, model, skip=skip)))
