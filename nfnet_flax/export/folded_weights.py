"""Folded weights as a safetensors file under our names: for other frameworks, and for `fold` without its work."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import CodeNotLoaded, from_json
from nfnet_flax.export.description import as_metadata
from nfnet_flax.export.options import ExportedNetwork, ExportOptions, rounded_arrays
from nfnet_flax.export.verify import Call, compiled_call
from nfnet_flax.models import Classifier, ModelConfig, build_model
from nfnet_flax.models.folding import fold, fold_batch_norms
from nfnet_flax.models.params import merge, split
from nfnet_flax.paths import local_path
from nfnet_flax.weights.entries import Entry, arrays_of, read_entries, shapes_of
from nfnet_flax.weights.files import read_safetensors, write_safetensors

SUFFIX = ".folded.safetensors"


def write_folded(
    folder: Path, name: str, exported: ExportedNetwork, options: ExportOptions, facts: dict[str, Any]
) -> list[str]:
    """Writes `NAME.folded.safetensors`; returns its name."""
    path = folder / f"{name}{SUFFIX}"
    arrays = rounded_arrays(arrays_of(exported.folded), options.dtype)
    write_safetensors(path, arrays, as_metadata(facts), overwrite=False)
    return [path.name]


def load_folded(path: str | os.PathLike[str]) -> Classifier:
    """The folded network of a file that `nfnet export --to safetensors` wrote. It cannot be trained.

    Raises:
      CodeNotLoaded: the network belongs to a family of a user's own, whose code is not loaded.
      ConfigError: the file cannot be read, is damaged, or was written by something else.
    """
    named = f"weights file {str(path)!r}"
    arrays, metadata = read_safetensors(local_path("weights file", path))
    if metadata.get("to") != "safetensors":
        raise ConfigError(f"{named} was not written by `nfnet export --to safetensors`")
    try:
        config = from_json(ModelConfig, json.loads(metadata["model"]), "model")
        num_classes = int(metadata["num_classes"])
    except CodeNotLoaded as error:
        raise CodeNotLoaded(f"{named}: {error}") from error
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{named}: its metadata are wrong: {error}") from error

    def build() -> Classifier:
        model = build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0))
        return fold(model) if model.is_foldable else fold_batch_norms(model)

    abstract = nnx.eval_shape(build)
    shapes = {name: shape for name, (shape, _) in shapes_of(abstract).items()}
    empty = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if 0 in shape}
    entries = [Entry(name, name, shape) for name, shape in shapes.items()]
    found = read_entries(named, abstract, entries, arrays | empty, ())
    model: Classifier = merge(split(abstract)[0], {name: jnp.asarray(value) for name, value in found.items()}, {})
    return model


def call_folded(path: Path) -> Call:
    """The network of the written file, in JAX."""
    return compiled_call(load_folded(path))
