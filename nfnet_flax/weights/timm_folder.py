"""Folders as model hubs hold them: `model.safetensors` with timm's names, and a `config.json` that timm reads."""

import functools
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flax import nnx

from nfnet_flax.config import ConfigError, require
from nfnet_flax.config_json import differences, from_json, to_json
from nfnet_flax.models import IMAGE_SIZES, ModelConfig, NFNetConfig, TimmNFNetConfig, build_model, model_config
from nfnet_flax.models.registry import VARIANTS
from nfnet_flax.weights.entries import HostArrays, write_entries
from nfnet_flax.weights.files import read_safetensors
from nfnet_flax.weights.hub import CONFIG, WEIGHTS
from nfnet_flax.weights.portable import FREE_FIELDS, ParameterKind, Preprocessing, WeightsInfo
from nfnet_flax.weights.state_dicts import unwrapped
from nfnet_flax.weights.timm import TIMM_FORM, timm_arrays, timm_entries

_OWN = "nfnet_flax"
"""Key of our own description in `config.json`; timm ignores it."""
_DEFAULT_CROP_SHARE = 0.875
"""Timm's crop share where a configuration gives none."""
_RESAMPLERS = {"bicubic": "pillow_bicubic", "bilinear": "pillow_bilinear"}
_ARGUMENTS = {"in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate"}
"""Arguments of timm's `create_model` that a folder may give."""


@functools.cache
def architectures() -> dict[str, str]:
    """Timm's name of a network -> our name."""
    own = {name.removeprefix("timm_"): name for name, config in VARIANTS.items() if isinstance(config, TimmNFNetConfig)}
    return own | {f"dm_nfnet_f{level}": f"nfnet_f{level}" for level in range(7)}


def is_folder(folder: Path) -> bool:
    """Whether a folder has the two files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_folder(folder: Path) -> tuple[WeightsInfo, HostArrays]:
    """Weights of one of timm's normalizer-free networks, and what its configuration says about them.

    Weights of `dm_nfnet_f0` ... become a network of the published form, in which they were trained, unless this package
    wrote the folder for another form.

    Raises:
      ConfigError: a file is missing or damaged, the network is none of these, or the arrays do not fit it.
    """
    named = f"weights folder {str(folder)!r}"
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named}: {CONFIG} cannot be read: {error}") from error
    require(isinstance(config, dict), f"{named}: {CONFIG}", config, "must be an object, as timm writes it")
    tensors = unwrapped(read_safetensors(folder / WEIGHTS)[0])
    try:
        info = info_of(config, f"folder {folder.name!r}")
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{named}: {CONFIG} is not as timm writes it: {type(error).__name__}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{named}: {CONFIG}: {error}") from error
    model = nnx.eval_shape(lambda: build_model(info.model, num_classes=info.num_classes, rngs=nnx.Rngs(0)))
    return info, timm_arrays(model, tensors)


def info_of(config: dict[str, Any], source: str) -> WeightsInfo:
    """The description of weights in timm's `config.json`.

    Args:
      config: content of the file.
      source: where the weights come from, for `WeightsInfo.source` if the file does not say it.

    Raises:
      ConfigError: it is of a network or has arguments that this package does not know.
    """
    given = config.get("pretrained_cfg", config)
    architecture = str(config.get("architecture"))
    remedy = f"is none of timm's normalizer-free networks: {', '.join(architectures())}"
    require(architecture in architectures(), "architecture", architecture, remedy)
    arguments = config.get("model_args", {})
    unknown = sorted(arguments.keys() - _ARGUMENTS)
    require(not unknown, "model_args", {name: arguments[name] for name in unknown}, "change the network; not supported")
    names = config.get("label_names", given.get("label_names"))
    if isinstance(names, dict):  # class number -> name
        names = [names[key] for key in sorted(names, key=int)]
    num_classes = int(config.get("num_classes", given.get("num_classes", 1000)))
    tag = given.get("tag") or ""
    if names is None and num_classes == 1000 and re.search(r"(?:^|_)in1k$", tag):
        names = imagenet_classes()
    if own := config.get(_OWN):
        model: ModelConfig = from_json(ModelConfig, own["model"], f"{_OWN}.model")
        preprocessing = own.get("preprocessing")
        kind: ParameterKind = own["parameters"]
        return WeightsInfo(
            model=model,
            num_classes=num_classes,
            source=own["source"],
            parameters=kind,
            class_names=None if names is None else tuple(names),
            preprocessing=None
            if preprocessing is None
            else from_json(Preprocessing, preprocessing, f"{_OWN}.preprocessing"),
            activation=own.get("activation", "softmax"),
        )
    model = model_config(
        architectures()[architecture],
        in_channels=int(arguments.get("in_chans", 3)),
        global_pool=arguments.get("global_pool", config.get("global_pool", "avg")).removeprefix("fast"),
    )
    return WeightsInfo(
        model=model,
        num_classes=num_classes,
        source=source,
        parameters="unknown",
        class_names=None if names is None else tuple(map(str, names)),
        preprocessing=_preprocessing(given),
    )


def _preprocessing(given: dict[str, Any]) -> Preprocessing:
    """How timm evaluates a network (`timm.data.create_transform`), at its test resolution if it has one."""
    has_test = given.get("test_input_size") is not None
    size = given["test_input_size"] if has_test else given["input_size"]
    require(size[1] == size[2], "input_size", size, "must be a square")
    share = (given.get("test_crop_pct") if has_test else None) or given.get("crop_pct") or _DEFAULT_CROP_SHARE
    interpolation = given.get("interpolation") or "bicubic"
    require(interpolation in _RESAMPLERS, "interpolation", interpolation, f"known are {', '.join(_RESAMPLERS)}")
    mode = given.get("crop_mode") or "center"
    require(mode in ("center", "squash"), "crop_mode", mode, "known are center, squash")
    mean, std = (tuple(round(255 * value, 6) for value in given[name]) for name in ("mean", "std"))
    return Preprocessing(
        image_size=size[1],
        crop_margin=max(0, math.floor(size[1] / share) - size[1]),
        resampler=_RESAMPLERS[interpolation],
        mean=mean * 3 if len(mean) == 1 else mean,
        std=std * 3 if len(std) == 1 else std,
        keeps_aspect=mode == "center",
    )


def imagenet_classes() -> tuple[str, ...] | None:
    """WordNet identifiers of ImageNet's 1000 classes in the order of the labels; None without TFDS, which has them."""
    found = find_spec("tensorflow_datasets")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / "datasets" / "imagenet2012" / "labels.txt"
    return tuple(file.read_text().split()) if file.is_file() else None


def architecture_of(config: ModelConfig) -> str:
    """Timm's name of the network of a configuration.

    Raises:
      ConfigError: timm has no such network.
    """
    free = {*FREE_FIELDS, "in_channels", "global_pool", *(TIMM_FORM if isinstance(config, NFNetConfig) else ())}
    for theirs, ours in architectures().items():
        lines = differences(to_json(VARIANTS[ours]), to_json(config))
        if all(line.partition(":")[0] in free for line in lines):
            return theirs
    raise ConfigError(
        f"model {type(config).__name__}: timm has no network of this form and these sizes, so it could not read the "
        f"folder; it has {', '.join(architectures())}"
    )


def folder_files(info: WeightsInfo, arrays: HostArrays) -> tuple[dict[str, Any], HostArrays]:
    """What `config.json` and `model.safetensors` contain, for timm and for `read_folder`.

    Args:
      info: description of the weights.
      arrays: our name -> array.

    Raises:
      ConfigError: timm has no such network.
    """
    architecture = architecture_of(info.model)
    model = nnx.eval_shape(lambda: build_model(info.model, num_classes=info.num_classes, rngs=nnx.Rngs(0)))
    channels = info.model.in_channels
    pretrained: dict[str, Any] = {"tag": "nfnet_flax", "custom_load": False, "num_classes": info.num_classes}
    if info.preprocessing is not None:
        pretrained |= _timm_preprocessing(info.preprocessing, channels)
    else:
        size = IMAGE_SIZES[architectures()[architecture]].test
        pretrained |= {"input_size": [channels, size, size]}
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": info.num_classes,
        "num_features": model.num_features,
        "global_pool": info.model.global_pool,
        "model_args": {"in_chans": channels, "global_pool": info.model.global_pool},
        "pretrained_cfg": pretrained,
        _OWN: {
            "model": to_json(info.model),
            "source": info.source,
            "parameters": info.parameters,
            "preprocessing": None if info.preprocessing is None else to_json(info.preprocessing),
            "activation": info.activation,
        },
    }
    if info.class_names is not None:
        config["label_names"] = list(info.class_names)
    return config, write_entries(timm_entries(model), arrays)


def _timm_preprocessing(given: Preprocessing, channels: int) -> dict[str, Any]:
    size, side = given.image_size, given.image_size + given.crop_margin
    share = size / side
    if math.floor(size / share) != side:  # by rounding
        share = size / (side + 0.25)
    return {
        "input_size": [channels, size, size],
        "crop_pct": share,
        "interpolation": "bilinear" if given.resampler == "pillow_bilinear" else "bicubic",
        "crop_mode": "center" if given.keeps_aspect else "squash",
        "mean": [value / 255 for value in given.mean],
        "std": [value / 255 for value in given.std],
    }
