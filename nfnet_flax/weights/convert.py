"""Foreign weight files -> our portable ones; checked before anything is written."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from nfnet_flax.models import Classifier, build_model, model_config
from nfnet_flax.weights.entries import Arrays
from nfnet_flax.weights.haiku import haiku_arrays
from nfnet_flax.weights.pickles import load_haiku_file
from nfnet_flax.weights.portable import ParameterKind, WeightsInfo, read_safetensors, write_weights
from nfnet_flax.weights.timm import TIMM_FORM, timm_arrays


def convert_haiku(path: Path, model: str, out: Path, *, parameters: ParameterKind) -> Path:
    """Converts a published file such as `F0_haiku.npz`; returns `out/MODEL.safetensors`.

    Raises:
      ConfigError: the file is refused (`load_haiku_file`) or does not fit the model.
    """
    tree = load_haiku_file(path)
    # The head is the one dense layer of the network itself: `NFNet/~/linear`; those of squeeze-excite lie deeper.
    head = next((leaves.get("b") for module, leaves in tree.items() if re.fullmatch(r"\w+/~/linear", module)), None)
    return _convert(path, model, out, parameters, tree, haiku_arrays, head, {})


def convert_timm(path: Path, model: str, out: Path, *, parameters: ParameterKind, timm_form: bool) -> Path:
    """Converts a `.safetensors` file of timm's `dm_nfnet_f*`; returns `out/MODEL.safetensors`.

    Args:
      path: timm's file.
      model: our name of the network.
      out: folder of the result.
      parameters: as trained, their moving average, or not known.
      timm_form: record the exact gelu and timm's standardization, for weights that were *trained* with timm. Those that
        timm ships were trained in the published form.

    Raises:
      ConfigError: the file cannot be read or does not fit the model.
    """
    tensors, _ = read_safetensors(path)
    form = TIMM_FORM if timm_form else {}
    return _convert(path, model, out, parameters, tensors, timm_arrays, tensors.get("head.fc.bias"), form)


def _convert(
    path: Path,
    name: str,
    out: Path,
    parameters: ParameterKind,
    stored: Mapping[str, Any],
    arrays_for: Callable[[Classifier, Any], Arrays],
    head: np.ndarray | None,
    form: dict[str, Any],
) -> Path:
    config = model_config(name, **form)
    num_classes = int(np.size(head)) if head is not None else 1000  # without a head it is listed as missing
    model = nnx.eval_shape(lambda: build_model(config, num_classes=max(1, num_classes), rngs=nnx.Rngs(0)))
    arrays = arrays_for(model, stored)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    info = WeightsInfo(
        model=config, num_classes=num_classes, source=f"{path.name}, SHA-256 {digest}", parameters=parameters
    )
    target = out / f"{name}.safetensors"
    write_weights(target, info, arrays)
    return target
