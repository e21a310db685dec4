"""Our own weight files: safetensors, arrays under our names, and metadata that says what they are."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nfnet_flax.config import ConfigError, differences, from_json, to_json
from nfnet_flax.models import Classifier, ModelConfig
from nfnet_flax.models.params import update
from nfnet_flax.weights.entries import Arrays, Entry, arrays_of, read_entries, shapes_of

_FORMAT = "nfnet_flax weights 1"
# These change how a network is trained, or how it is computed, but not which function its parameters stand for.
_FREE_FIELDS = ("drop_rate", "stochdepth_rate", "compute_dtype", "train_image_size", "test_image_size")
ParameterKind = Literal["raw", "ema", "unknown"]


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """What a weight file says about itself."""

    model: ModelConfig
    """The network."""
    num_classes: int
    """Outputs of its head."""
    source: str
    """Where the weights come from."""
    parameters: ParameterKind
    """As trained, their moving average, or not known."""


def save_weights(path: str | Path, model: Classifier, *, source: str, parameters: ParameterKind) -> None:
    """Writes a network's arrays; see `write_weights`."""
    info = WeightsInfo(model=model.config, num_classes=model.num_classes, source=source, parameters=parameters)
    write_weights(path, info, arrays_of(model))


def write_weights(path: str | Path, info: WeightsInfo, arrays: Arrays) -> None:
    """Writes arrays under our names; the file appears under its name only when it is complete.

    Raises:
      ConfigError: the file cannot be written.
    """
    path = Path(path)
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(to_json(info.model)),
        "num_classes": str(info.num_classes),
        "source": info.source,
        "parameters": info.parameters,
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors writes the memory as it lies: a transposed view would be stored wrongly, without an error.
        save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights file {str(path)!r} cannot be written: {error}") from error


def read_weights(path: str | Path) -> tuple[WeightsInfo, Arrays]:
    """Reads what `save_weights` wrote.

    Raises:
      ConfigError: the file cannot be read, is damaged, or was written by something else.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        raise ConfigError(
            f"weights file {str(path)!r} was not written by nfnet_flax: convert it with `nfnet convert timm`"
        )
    info = WeightsInfo(
        model=from_json(ModelConfig, json.loads(metadata["model"]), "model"),
        num_classes=int(metadata["num_classes"]),
        source=metadata["source"],
        parameters=metadata["parameters"],  # type: ignore[arg-type]
    )
    return info, tensors


def read_safetensors(path: str | Path) -> tuple[Arrays, dict[str, str]]:
    """Tensors and metadata of any `.safetensors` file.

    Raises:
      ConfigError: the file cannot be read or is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights file {str(path)!r} cannot be read: {error}") from error


def stored_arrays(path: str | Path, model: Classifier, *, skip: Sequence[str] = ()) -> Arrays:
    """Arrays of a weight file for a network, which may be abstract (`nnx.eval_shape`); checked, not loaded.

    Args:
      path: a file that `save_weights` wrote.
      model: the network.
      skip: shell-style patterns of names that are left out, such as `head.*` for a head of another size.

    Raises:
      ConfigError: the file cannot be read, is of another network, or does not fit; lists all differences.
    """
    info, tensors = read_weights(path)
    lines = [
        line
        for line in differences(to_json(info.model), to_json(model.config))
        if line.split(":")[0] not in _FREE_FIELDS
    ]
    if lines:
        raise ConfigError(
            f"weights file {str(path)!r} is of another network (file -> asked for):\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    entries = [Entry(name, name, shape) for name, (shape, _) in shapes_of(model).items()]
    return read_entries(f"weights file {str(path)!r}", model, entries, tensors, skip)


def load_weights(model: Classifier, path: str | Path, *, skip: Sequence[str] = ()) -> None:
    """Replaces a network's arrays by those of a weight file, in place; see `stored_arrays`."""
    update(model, dict(stored_arrays(path, model, skip=skip)))
