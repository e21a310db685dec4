"""Conversion from and to timm's normalizer-free networks (PyTorch): OIHW kernels, safetensors files."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.models import Classifier, NFNetConfig, NFRegNetConfig, NFResNetConfig, TimmNFNetConfig
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
    "attention.reduce": "attn_last.fc1",
    "attention.expand": "attn_last.fc2",
    "attention": "attn_last.conv",
}
"""Our name of a part of a block -> timm's. In RegNet's blocks attention is not the last part, and called `attn`."""
TIMM_FORM: dict[str, Any] = {"activation": "gelu_erf", "standardization": "timm"}
"""Fields of `NFNetConfig` that make a network compute what timm's `dm_nfnet_f0` ... `dm_nfnet_f6` compute: pass them to
`create_model`. Timm's other networks are made by their own names, such as `eca_nfnet_l0`."""


def from_timm(model: Classifier, tensors: Mapping[str, Any], *, skip: Sequence[str] = ()) -> None:
    """Replaces the parameters of a normalizer-free network, in place.

    The outputs of an NFNet equal those of timm's `dm_nfnet_f0` and so on if the network was made with `**TIMM_FORM`.
    Without it, the network computes in the published form, in which the weights that timm distributes were trained.
    Timm's other networks (`TimmNFNetConfig`) compute what timm computes.

    Args:
      model: an NFNet, or one of timm's own networks; for one without classes the head is left out.
      tensors: timm's state dict as NumPy arrays, as `safetensors.numpy.load_file` returns it. Prefixes that wrappers
        add to all names are removed (`state_dicts.unwrapped`).
      skip: shell-style patterns of our names that keep what they have, such as `head.*` for a head of another size.

    Raises:
      ConfigError: entries are missing, unexpected or misshaped; or the network is of another family.
    """
    update(model, dict(timm_arrays(model, tensors, skip=skip)))


def timm_arrays(model: Classifier, tensors: Mapping[str, Any], *, skip: Sequence[str] = ()) -> HostArrays:
    """The arrays that `from_timm` would put into a network, which may be abstract (`nnx.eval_shape`)."""
    given = unwrapped(tensors)
    if model.num_classes == 0:
        given = {name: value for name, value in given.items() if not name.startswith("head.fc.")}
    return read_entries("the timm state dict", model, timm_entries(model), given, skip)


def to_timm(model: Classifier) -> HostArrays:
    """The inverse of `from_timm`: names and layouts of timm's state dict.

    Raises:
      ConfigError: the network is of another family.
    """
    return write_entries(timm_entries(model), arrays_of(model))


def timm_entries(model: Classifier) -> list[Entry]:
    """One entry per parameter of a normalizer-free network, which may be abstract (`nnx.eval_shape`).

    Raises:
      ConfigError: the network is of a family whose parameters have no names in timm.
    """
    config = model.config
    if not isinstance(config, NFNetConfig | TimmNFNetConfig):
        kind = type(config).__name__
        hint = ""
        if isinstance(config, NFResNetConfig | NFRegNetConfig):
            hint = ". Networks of such names in timm are others: they are timm_nf_resnet50, timm_nf_regnet_b1 and so on"
        raise ConfigError(f"model {kind}: timm's names are for NFNet and timm's own networks only{hint}")
    is_single = isinstance(config, TimmNFNetConfig) and config.stem != "four_3x3"
    part_of = dict(_BLOCK)
    if isinstance(config, TimmNFNetConfig) and config.is_regnet:
        part_of = {ours: theirs.replace("attn_last", "attn") for ours, theirs in _BLOCK.items()}
    return [_entry(name, shape, part_of, is_single=is_single) for name, (shape, _) in shapes_of(model).items()]


def _entry(name: str, shape: tuple[int, ...], part_of: Mapping[str, str], *, is_single: bool) -> Entry:
    path, leaf = name.rsplit(".", 1)
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)(?:\.(.+))?", path):
        prefix = f"stages.{match[1]}.{match[2]}"
        theirs = prefix if match[3] is None else f"{prefix}.{part_of[match[3]]}"
    elif match := re.fullmatch(r"stem\.(\d)", path):
        theirs = "stem.conv" if is_single else f"stem.conv{int(match[1]) + 1}"
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
    if path.endswith(".attention"):
        return Entry(name, theirs, (1, 1, shape[0]), _taps_from_1d, _taps_to_1d)
    if len(shape) == 2 and path != "head":  # timm's squeeze-excite is made of 1x1 convolutions
        return Entry(name, theirs, (shape[1], shape[0], 1, 1), _dense_from_1x1, _dense_to_1x1)
    if len(shape) == 2:
        return Entry(name, theirs, (shape[1], shape[0]), np.transpose, np.transpose)
    return Entry(name, theirs, shape)


def _dense_from_1x1(value: np.ndarray) -> np.ndarray:
    return value[:, :, 0, 0].T


def _taps_from_1d(value: np.ndarray) -> np.ndarray:
    return value.reshape(-1, 1)


def _taps_to_1d(value: np.ndarray) -> np.ndarray:
    return value.reshape(1, 1, -1)


def _dense_to_1x1(value: np.ndarray) -> np.ndarray:
    return value.T[:, :, None, None]
