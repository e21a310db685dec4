"""Reads the goldens, and fills parameters the way they were filled when the goldens were made."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfnet_flax.models import ModelConfig, NFNetConfig, build_model
from nfnet_flax.models.params import BatchStats, GraphDef, Params, split
from nfnet_flax.weights.haiku import haiku_entries

FOLDER = Path(__file__).parent / "goldens"
TINY = NFNetConfig(widths=(32, 64, 128, 128), depths=(1, 2, 2, 1), group_width=8, stochdepth_rate=0.0)


def load(name: str) -> dict[str, Any]:
    """Arrays of a golden, with `params` and `meta` parsed."""
    with np.load(FOLDER / f"{name}.npz") as file:
        golden = dict(file)
    return golden | {key: json.loads(str(golden[key])) for key in ("params", "meta", "metrics")}


def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one parameter of the published code."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(path.encode()))).standard_normal(shape, dtype=np.float32)
    leaf = path.rsplit("/", 1)[1]
    if leaf == "w":
        n = n / np.sqrt(np.prod(shape[:-1]))
    elif leaf in ("gain", "scale"):
        n = 1 + 0.1 * n
    elif leaf == "skip_gain":
        n = 0.5 + 0.1 * n
    else:
        n = 0.1 * n
    return np.asarray(n, np.float32)


def filled(config: ModelConfig, num_classes: int) -> tuple[GraphDef, Params, BatchStats, dict[str, tuple[int, ...]]]:
    """Structure, filled parameters, running statistics as they begin, and the published name and shape of each
    parameter."""
    model = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    graphdef, shapes, statistics = split(model)
    published = {entry.ours: entry for entry in haiku_entries(model)}
    params = {
        name: jax.numpy.asarray(published[name].to_ours(fill(published[name].theirs, published[name].shape)))
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
        name: (jax.numpy.ones if name.endswith(".variance") else jax.numpy.zeros)(leaf.shape, leaf.dtype)
        for name, leaf in shapes.items()
    }


def images(meta: dict[str, Any]) -> np.ndarray:
    """The golden's input."""
    size = meta["image_size"]
    return np.random.Generator(np.random.PCG64(0)).standard_normal((meta["batch"], size, size, 3), dtype=np.float32)
