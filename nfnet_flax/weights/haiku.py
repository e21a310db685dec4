"""Conversion from and to the trees of the published Haiku code: `{module: {name: array}}`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.models import Classifier, ModelConfig, NFNetConfig, NFRegNetConfig, NFResNetConfig, ResNetConfig
from nfnet_flax.models.params import update
from nfnet_flax.weights.entries import Entry, HostArrays, arrays_of, read_entries, shapes_of, write_entries

Tree = dict[str, dict[str, np.ndarray]]

# Class of a configuration -> published names of the network, of its blocks, and of the stem's convolutions.
_NAMES: dict[type, tuple[str, str, str]] = {
    NFNetConfig: ("NFNet", "nf_block", "stem_conv{}"),
    NFResNetConfig: ("NF_ResNet", "nf_res_block", "initial_conv"),
    NFRegNetConfig: ("NF_RegNet", "nf_block", "initial_conv"),
    ResNetConfig: ("ResNet", "res_block_v2", "initial_conv"),
}
_INNER = {"squeeze_excite.reduce": "squeeze_excite/~/linear", "squeeze_excite.expand": "squeeze_excite/~/linear_1"}
_STATISTICS = {"mean": "~/mean_ema/average", "variance": "~/var_ema/average", "count": "~/mean_ema/counter"}


def from_haiku(model: Classifier, params: Mapping[str, Mapping[str, Any]], *, skip: Sequence[str] = ()) -> None:
    """Replaces a network's arrays, in place.

    Args:
      model: an NFNet, NF-ResNet, NF-RegNet or plain ResNet.
      params: the published tree. For a ResNet it must also contain the modules of the state (`{**params, **state}`).
      skip: shell-style patterns of our names that keep what they have, such as `head.*` for a head of another size, or
        `*.mean`, `*.variance` and `*.count` for a ResNet without its state.

    Raises:
      ConfigError: entries are missing, unexpected or misshaped; or the network has no published form.
    """
    update(model, dict(haiku_arrays(model, params, skip=skip)))


def haiku_arrays(model: Classifier, params: Mapping[str, Mapping[str, Any]], *, skip: Sequence[str] = ()) -> HostArrays:
    """The arrays that `from_haiku` would put into a network, which may be abstract (`nnx.eval_shape`)."""
    given = {f"{module}/{name}": value for module, leaves in params.items() for name, value in leaves.items()}
    entries = haiku_entries(model)
    _drop_redundant_state(given, model)
    return read_entries("the Haiku tree", model, entries, given, skip)


def to_haiku(model: Classifier) -> Tree:
    """The inverse of `from_haiku`.

    Raises:
      ConfigError: the network has no published form.
    """
    flat = write_entries(haiku_entries(model), arrays_of(model))
    _add_redundant_state(flat, model)
    tree: Tree = {}
    for path, value in flat.items():
        module, name = path.rsplit("/", 1)
        tree.setdefault(module, {})[name] = value
    return tree


def haiku_entries(model: Classifier) -> list[Entry]:
    """One entry per array of a network, which may be abstract (`nnx.eval_shape`).

    Raises:
      ConfigError: the network has no published form.
    """
    config: ModelConfig = model.config
    if type(config) not in _NAMES or (isinstance(config, ResNetConfig) and (config.is_d or config.num_groups > 1)):
        raise ConfigError(
            f"model {type(config).__name__}: the Haiku code has NFNet, NF-ResNet, NF-RegNet and plain ResNet only"
        )
    depths = tuple(len(stage) for stage in model.stages)
    entries = []
    for name, (shape, _) in shapes_of(model).items():
        theirs = haiku_name(config, depths, name)
        if theirs.rsplit("/", 1)[1] in ("scale", "offset", "average"):
            # BatchNorm's arrays are (1, 1, 1, C) in the published code.
            entries.append(Entry(name, theirs, (1, 1, 1, *shape), np.ravel, _as_nhwc))
        else:
            entries.append(Entry(name, theirs, shape))
    return entries


def _as_nhwc(value: np.ndarray) -> np.ndarray:
    return value[None, None, None, :]


def haiku_name(config: ModelConfig, depths: tuple[int, ...], name: str) -> str:
    """The name `module/name` in the published code for one of our names, such as `stages.1.0.conv1b.kernel`.

    The published code numbers the blocks of all stages in one sequence; `depths` are the numbers of blocks of the
    stages.
    """
    root, block, stem = _NAMES[type(config)]
    path, leaf = name.rsplit(".", 1)
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)(?:\.(.+))?", path):
        index = sum(depths[: int(match[1])]) + int(match[2])
        module = f"{block}_{index}" if index else block
        inner = match[3]
        if inner is not None:
            module += f"/~/{_INNER.get(inner, inner)}"
    elif match := re.fullmatch(r"stem(?:\.(\d))?", path):
        module = stem.format(match[1])
    else:
        module = {"head": "linear"}.get(path, path)
    return f"{root}/~/{module}/{_leaf(module, leaf)}"


def _leaf(module: str, leaf: str) -> str:
    if re.search(r"linear(_1)?$", module):
        return {"kernel": "w", "bias": "b"}[leaf]
    if re.search(r"bn\d?$", module):
        return {"gain": "scale", "bias": "offset", **_STATISTICS}[leaf]
    return {"kernel": "w"}.get(leaf, leaf)


# The published state of a BatchNorm contains redundant arrays: both averages have a counter, which are equal, and a
# `hidden` sum, which is the average times `1 - decay ** counter`.


def _drop_redundant_state(given: dict[str, Any], model: Classifier) -> None:
    for path in [path for path in given if path.endswith("/~/var_ema/counter")]:
        bn = path.removesuffix("/~/var_ema/counter")
        counter = given.pop(path)
        if not np.array_equal(counter, given.get(f"{bn}/~/mean_ema/counter", counter)):
            raise ConfigError(f"{bn}: the counters of mean_ema and var_ema differ: the state is damaged")
        for kind in ("mean", "var"):
            hidden = given.pop(f"{bn}/~/{kind}_ema/hidden", None)
            average = given.get(f"{bn}/~/{kind}_ema/average")
            if hidden is None or average is None or np.shape(hidden) != np.shape(average):
                continue
            expected = np.asarray(average) * _unbias(model, np.asarray(counter))
            if not np.allclose(hidden, expected, rtol=1e-4, atol=1e-6 * float(np.max(np.abs(expected), initial=0))):
                raise ConfigError(
                    f"{bn}/~/{kind}_ema: hidden is not average * (1 - decay ** counter) for decay "
                    f"{_decay(model)}: give the decay it was trained with as batch_norm_decay"
                )


def _add_redundant_state(flat: HostArrays, model: Classifier) -> None:
    for path in [path for path in flat if path.endswith("/~/mean_ema/counter")]:
        bn = path.removesuffix("/~/mean_ema/counter")
        flat[f"{bn}/~/var_ema/counter"] = flat[path]
        for kind in ("mean", "var"):
            average = flat[f"{bn}/~/{kind}_ema/average"]
            flat[f"{bn}/~/{kind}_ema/hidden"] = (average * _unbias(model, flat[path])).astype(np.float32)


def _unbias(model: Classifier, counter: np.ndarray) -> np.ndarray:
    return 1.0 - np.float64(_decay(model)) ** counter


def _decay(model: Classifier) -> float:
    """Decay rate of the running statistics; only ResNet has these among the families with published Haiku code."""
    assert isinstance(model.config, ResNetConfig)
    return model.config.batch_norm_decay
