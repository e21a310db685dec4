"""Outputs of the published Haiku code, which were computed once in float64, and how far our networks are from them.

A golden is a `.npz` file with the network's outputs. Parameters and images are not stored: both are drawn from
generators whose seeds follow from the published names of the parameters.
"""

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models import ModelConfig, NFNetConfig, build_model, model_config
from nfnet_flax.models.params import BatchStats, GraphDef, Params, merge, split
from nfnet_flax.weights.haiku import haiku_entries

TINY = NFNetConfig(widths=(32, 64, 128, 128), depths=(1, 2, 2, 1), group_width=8, stochdepth_rate=0.0)
NETWORKS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "nfnet_tiny": TINY,
        "nfnet_f0": model_config("nfnet_f0"),
        "nf_resnet50": model_config("nf_resnet50"),
        "nf_regnet_b0": model_config("nf_regnet_b0"),
        "resnet50_bn": model_config("resnet50"),
    }
)
"""Name of a golden -> the network."""
Precision = Literal["float32", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden:
    """What the published code gave for one network."""

    name: str
    """A key of `NETWORKS`."""
    logits: np.ndarray
    """(N, classes) float64."""
    image_size: int
    """Height and width of the images, in pixels."""
    is_training: bool
    """Whether BatchNorm used the statistics of the batch."""
    shapes: Mapping[str, tuple[int, ...]]
    """Published name `module/name` of each parameter -> its shape."""


def read_goldens(folder: Path) -> list[Golden]:
    """The goldens in a folder, in the order of `NETWORKS`.

    Raises:
      ConfigError: there is none, or one of them is damaged.
    """
    paths = {name: folder / f"{name}.npz" for name in NETWORKS}
    found = [_read(name, path) for name, path in paths.items() if path.is_file()]
    if not found:
        raise ConfigError(
            f"goldens = {str(folder)!r}: holds none of {', '.join(path.name for path in paths.values())}: give the "
            "folder tests/goldens of the repository"
        )
    return found


def _read(name: str, path: Path) -> Golden:
    try:
        with np.load(path) as file:
            meta: dict[str, Any] = json.loads(str(file["meta"]))
            return Golden(
                name=name,
                logits=np.asarray(file["logits"], np.float64),
                image_size=int(meta["image_size"]),
                is_training=meta.get("mode") is not None,
                shapes={path: tuple(shape) for path, shape in json.loads(str(file["params"]))},
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"goldens: {str(path)!r} is damaged ({error}): copy it again from the repository") from error


def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one parameter of the published code, float32.

    Args:
      path: published name, such as `NFNet/~/final_conv/w`; the seed follows from it.
      shape: shape in the published code.
    """
    n = np.random.Generator(np.random.PCG64(zlib.crc32(path.encode()))).standard_normal(shape, dtype=np.float32)
    match path.rsplit("/", 1)[1]:
        case "w":
            n = n / np.sqrt(np.prod(shape[:-1]))
        case "gain" | "scale":
            n = 1 + 0.1 * n
        case "skip_gain":
            n = 0.5 + 0.1 * n
        case _:
            n = 0.1 * n
    return np.asarray(n, np.float32)


def filled(config: ModelConfig, num_classes: int) -> tuple[GraphDef, Params, BatchStats, dict[str, tuple[int, ...]]]:
    """Structure, filled parameters, running statistics as they begin, and the published name and shape of each
    parameter."""
    model = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    graphdef, shapes, statistics = split(model)
    published = {entry.ours: entry for entry in haiku_entries(model)}
    params = {
        name: jnp.asarray(published[name].to_ours(fill(published[name].theirs, published[name].shape)))
        for name in shapes
    }
    return (
        graphdef,
        params,
        initial_statistics(statistics),
        {published[name].theirs: published[name].shape for name in shapes},
    )


def initial_statistics(shapes: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> BatchStats:
    """Running statistics as they begin."""
    return {
        name: (jnp.ones if name.endswith(".variance") else jnp.zeros)(leaf.shape, leaf.dtype)
        for name, leaf in shapes.items()
    }


def input_images(batch_size: int, image_size: int) -> np.ndarray:
    """The input of a golden, (N, size, size, 3) float32."""
    shape = (batch_size, image_size, image_size, 3)
    return np.random.Generator(np.random.PCG64(0)).standard_normal(shape, dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a network is from a golden."""

    golden: str
    num_parameters: int
    """Number of parameters of the published code."""
    has_same_parameters: bool
    """Whether our network has the same parameters, by name and shape."""
    difference: dict[str, float]
    """Type of the computation -> largest difference of a logit, as a share of the largest logit."""


def agreement(golden: Golden, precisions: tuple[Precision, ...] = ("float32", "float64")) -> Agreement:
    """Computes our network on a golden's parameters and images."""
    found: dict[str, float] = {}
    for precision in precisions:
        with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
            logits, shapes = _logits(golden, precision)
        found[precision] = float(np.max(np.abs(logits - golden.logits)) / np.max(np.abs(golden.logits)))
    return Agreement(
        golden=golden.name,
        num_parameters=sum(map(math.prod, golden.shapes.values())),
        has_same_parameters=shapes == golden.shapes,
        difference=found,
    )


def _logits(golden: Golden, precision: Precision) -> tuple[np.ndarray, dict[str, tuple[int, ...]]]:
    config = dataclasses.replace(NETWORKS[golden.name], compute_dtype=precision)
    batch_size, num_classes = golden.logits.shape
    graphdef, params, batch_stats, shapes = filled(config, num_classes)

    @jax.jit
    def run(params: Params, images: jax.Array) -> jax.Array:
        model = merge(graphdef, params, batch_stats)
        if not golden.is_training:
            model.eval()
        return model(images)

    return np.asarray(run(params, input_images(batch_size, golden.image_size)), np.float64), shapes
