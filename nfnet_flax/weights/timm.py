"""Conversion from and to timm's `dm_nfnet_f0` ... `dm_nfnet_f6` (PyTorch): OIHW kernels, safetensors files."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.models import Classifier, NFNetConfig
from nfnet_flax.models.params import update
from nfnet_flax.weights.entries import Entry, HostArrays, arrays_of, read_entries, shapes_of, write_entries
from nfnet_flax.weights.state_dicts import unwrapped

_BLOCK = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv_shortcut": "downsample.conv",
    "squeeze_excite.reduce": "attn_last.fc1",
    "squeeze_excite.expand": "attn_last.fc2",
}
TIMM_FORM: dict[str, Any] = {"activation": "gelu_erf", "standardization": "timm"}
"""Fields of `NFNetConfig` that make a network compute what timm computes: pass them to `create_model`."""


def from_timm(model: Classifier, tensors: Mapping[str, Any], *, skip: Sequence[str] = ()) -> None:
    """Replaces the parameters of an NFNet, in place.

    The outputs equal timm's if the network was made with `**TIMM_FORM`. Without it, the network computes in the
    published form, in which the weights that timm distributes were trained.

    Args:
      model: an NFNet.
      tensors: timm's state dict as NumPy arrays, as `safetensors.numpy.load_file` returns it. Prefixes that wrappers
        add to all names are removed (`state_dicts.unwrapped`).
      skip: shell-style patterns of our names that keep what they have, such as `head.*` for a head of another size.

    Raises:
      ConfigError: entries are missing, unexpected or misshaped; or the network is not an NFNet.
    """
    update(model, dict(timm_arrays(model, tensors, skip=skip)))


def timm_arrays(model: Classifier, tensors: Mapping[str, Any], *, skip: Sequence[str] = ()) -> HostArrays:
    """The arrays that `from_timm` would put into a network, which may be abstract (`nnx.eval_shape`)."""
    return read_entries("the timm state dict", model, timm_entries(model), unwrapped(tensors), skip)


def to_timm(model: Classifier) -> HostArrays:
    """The inverse of `from_timm`: names and layouts of timm's state dict.

    Raises:
      ConfigError: the network is not an NFNet.
    """
    return write_entries(timm_entries(model), arrays_of(model))


def timm_entries(model: Classifier) -> list[Entry]:
    """One entry per parameter of an NFNet, which may be abstract (`nnx.eval_shape`).

    Raises:
      ConfigError: the network is not an NFNet.
    """
    if not isinstance(model.config, NFNetConfig):
        raise ConfigError(f"model {type(model.config).__name__}: timm's dm_nfnet names are for NFNet only")
    return [_entry(name, shape) for name, (shape, _) in shapes_of(model).items()]


def _entry(name: str, shape: tuple[int, ...]) -> Entry:
    path, leaf = name.rsplit(".", 1)
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)(?:\.(.+))?", path):
        prefix = f"stages.{match[1]}.{match[2]}"
        theirs = prefix if match[3] is None else f"{prefix}.{_BLOCK[match[3]]}"
    elif match := re.fullmatch(r"stem\.(\d)", path):
        theirs = f"stem.conv{int(match[1]) + 1}"
    else:
        theirs = {"head": "head.fc"}.get(path, path)
    theirs = f"{theirs}.{({'kernel': 'weight', 'skip_gain': 'skipinit_gain'}).get(leaf, leaf)}"
    if leaf == "gain":
        return Entry(name, theirs, (*shape, 1, 1, 1), np.ravel, functools.partial(np.reshape, shape=(-1, 1, 1, 1)))
    if len(shape) == 4:
        return Entry(
            name,
            theirs,
            (shape[3], shape[2], shape[0], shape[1]),
            functools.partial(np.transpose, axes=(2, 3, 1, 0)),
            functools.partial(np.transpose, axes=(3, 2, 0, 1)),
        )
    if len(shape) == 2 and path != "head":  # timm's squeeze-excite is made of 1x1 convolutions
        return Entry(name, theirs, (shape[1], shape[0], 1, 1), _dense_from_1x1, _dense_to_1x1)
    if len(shape) == 2:
        return Entry(name, theirs, (shape[1], shape[0]), np.transpose, np.transpose)
    return Entry(name, theirs, shape)


def _dense_from_1x1(value: np.ndarray) -> np.ndarray:
    return value[:, :, 0, 0].T


def _dense_to_1x1(value: np.ndarray) -> np.ndarray:
    return value.T[:, :, None, None]
