"""Converts weight files of other projects to our portable files; they are checked before anything is written."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models import Classifier, TimmNFNetConfig, build_model, model_config
from nfnet_flax.paths import hub_name, local_path
from nfnet_flax.progress import tracking
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.files import check_target, read_safetensors
from nfnet_flax.weights.haiku import haiku_arrays
from nfnet_flax.weights.pickles import load_haiku_file
from nfnet_flax.weights.portable import ParameterKind, WeightsInfo, write_weights
from nfnet_flax.weights.reference import open_weights
from nfnet_flax.weights.state_dicts import unwrapped
from nfnet_flax.weights.timm import TIMM_FORM, timm_arrays
from nfnet_flax.weights.timm_folder import architecture_of, architectures


def convert_haiku(
    path: str | os.PathLike[str],
    model: str,
    out: str | os.PathLike[str],
    *,
    parameters: ParameterKind,
    overwrite: bool = False,
) -> Path:
    """Converts a published file such as `F0_haiku.npz`; returns `out/MODEL.safetensors`.

    Raises:
      ConfigError: the file is refused (`load_haiku_file`) or does not fit the model, or the result exists already and
        must not be replaced (`overwrite`).
    """
    path, target = local_path("file", path), target_in(out, model, overwrite=overwrite)
    with tracking(f"reading {path}"):
        tree = load_haiku_file(path)
    # The head is the dense layer directly in the network, `NFNet/~/linear`; those of squeeze-excite have longer names.
    head = next((leaves.get("b") for module, leaves in tree.items() if re.fullmatch(r"\w+/~/linear", module)), None)
    info, arrays = _converted(path, model, parameters, tree, haiku_arrays, head, {})
    write_weights(target, info, arrays, overwrite=overwrite)
    return target


def convert_timm(
    path: str | os.PathLike[str],
    model: str | None,
    out: str | os.PathLike[str],
    *,
    parameters: ParameterKind,
    timm_form: bool,
    overwrite: bool = False,
) -> Path:
    """Converts weights of timm's normalizer-free networks; returns `out/MODEL.safetensors`.

    Args:
      path: timm's `.safetensors` file; or a folder with `config.json` and `model.safetensors`, or a name in a model
        hub, such as `timm/eca_nfnet_l0.ra2_in1k`: class names and preprocessing are then kept.
      model: our name of the network; None for a folder or a name in a hub, which say it.
      out: folder for the result.
      parameters: which parameters the file contains: as trained, their moving average, or unknown.
      timm_form: whether to record the exact gelu and timm's standardization, for weights of `dm_nfnet_f*` that were
        *trained* with timm. The weights that timm distributes for these were trained in the published form.
      overwrite: whether to replace an existing file.

    Raises:
      ConfigError: the file cannot be read or does not fit the model, the result exists already, or the form is given
        for a network that has no other.
      HubUnreachable: the model hub cannot be reached.
    """
    if hub_name(path) is not None or local_path("file", path).is_dir():
        return _convert_described(path, model, out, parameters, timm_form=timm_form, overwrite=overwrite)
    if model is None:
        raise ConfigError(f"model: a file does not say which network it is of: give --model; file = {str(path)!r}")
    path, target = local_path("file", path), target_in(out, model, overwrite=overwrite)
    _check_form(model, timm_form=timm_form)
    tensors = unwrapped(read_safetensors(path)[0])
    changes = TIMM_FORM if timm_form else {}
    info, arrays = _converted(path, model, parameters, tensors, timm_arrays, tensors.get("head.fc.bias"), changes)
    write_weights(target, info, arrays, overwrite=overwrite)
    return target


def _check_form(name: str, *, timm_form: bool) -> None:
    if timm_form and isinstance(model_config(name), TimmNFNetConfig):
        raise ConfigError(f"timm_form: {name} always computes what timm computes; leave it out")


def _convert_described(
    reference: str | os.PathLike[str],
    model: str | None,
    out: str | os.PathLike[str],
    parameters: ParameterKind,
    *,
    timm_form: bool,
    overwrite: bool,
) -> Path:
    """`convert_timm` for weights that come with a description."""
    info, arrays = open_weights(reference, field="file")
    name = architectures()[architecture_of(info.model)]
    if model not in (None, name):
        raise ConfigError(f"model = {model!r}: {os.fspath(reference)!r} is of {name}: leave it out")
    target = target_in(out, name, overwrite=overwrite)
    _check_form(name, timm_form=timm_form)
    config = dataclasses.replace(info.model, **TIMM_FORM) if timm_form else info.model
    kind = info.parameters if parameters == "unknown" else parameters
    write_weights(target, dataclasses.replace(info, model=config, parameters=kind), arrays, overwrite=overwrite)
    return target


def target_in(out: str | os.PathLike[str], name: str, *, overwrite: bool) -> Path:
    """The file `out/NAME.safetensors`, checked before any work is done.

    Raises:
      ConfigError: `out` is not a folder, or the file exists and must not be replaced.
    """
    folder = local_path("out", out)
    if folder.suffix == ".safetensors" or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"out = {os.fspath(out)!r}: is the name of a file: give the folder for the result")
    target = folder / f"{name}.safetensors"
    check_target(target, overwrite=overwrite)
    return target


def _converted(
    path: Path,
    name: str,
    parameters: ParameterKind,
    stored: Mapping[str, Any],
    arrays_for: Callable[[Classifier, Any], HostArrays],
    head: np.ndarray | None,
    changes: dict[str, Any],
) -> tuple[WeightsInfo, HostArrays]:
    config = model_config(name, **changes)
    num_classes = int(np.size(head)) if head is not None else 1000  # if there is no head, it is reported as missing
    model = nnx.eval_shape(lambda: build_model(config, num_classes=max(1, num_classes), rngs=nnx.Rngs(0)))
    arrays = arrays_for(model, stored)
    with tracking(f"checksum of {path}"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = f"{path.name}, SHA-256 {digest}"
    return WeightsInfo(model=config, num_classes=num_classes, source=source, parameters=parameters), arrays
