"""Accuracy of released weight files on an ImageNet validation set, by the functions that `nfnet eval` uses."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Literal

from nfnet_flax.config import ConfigError
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import reading
from nfnet_flax.data.recognition import evaluation_source
from nfnet_flax.data.source_config import ArrayRecordSource, FolderSource, SourceConfig
from nfnet_flax.models.registry import IMAGE_SIZES, name_of
from nfnet_flax.paths import local_path
from nfnet_flax.training.evaluating import data_for, measure_weights, opened_weights
from nfnet_flax.weights.convert import convert_haiku, convert_timm
from nfnet_flax.weights.entries import DoesNotFit, HostArrays
from nfnet_flax.weights.portable import WeightsInfo
from nfnet_flax.weights.timm_folder import is_folder

_HAIKU = re.compile(r"F(\d\+?)_haiku\.npz")
_TIMM = re.compile(r"dm_nfnet_f(\d)(?!\d).*\.safetensors")
_CROP_MARGIN = 32
"""Number of pixels that the published evaluation cuts off each axis of a resized image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A weight file, or a folder as model hubs hold them."""

    path: Path
    form: Literal["haiku", "timm", "described"]
    """`haiku`: a published pickle. `timm`: timm's arrays. `described`: what `nfnet eval --weights` takes."""
    model: str | None
    """Our name of the network; None: the file says it itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Result of one weight file."""

    weights: str
    """Name of the file or folder."""
    model: str | None
    """Our name of the network; None: it has none."""
    image_size: int
    """Height and width of the evaluated images, in pixels."""
    preparation: Literal["published", "recorded"]
    """How images were prepared: as published, or as the weights record it."""
    num_examples: int
    top1: float
    """Share of images whose most probable class is right."""
    top5: float


def weight_files(folder: Path) -> list[WeightFile]:
    """The weights in a folder, sorted by name: `F0_haiku.npz`, `dm_nfnet_f0*.safetensors` of timm, files that `nfnet
    convert` wrote, and folders with timm's `config.json`.

    Raises:
      ConfigError: it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise ConfigError(f"weights = {str(folder)!r}: is no folder: give the one in which the weight files lie")
    found: list[WeightFile] = []
    for path in sorted(folder.iterdir()):
        if haiku := _HAIKU.fullmatch(path.name):
            found.append(WeightFile(path=path, form="haiku", model=f"nfnet_f{haiku[1]}"))
        elif timm := _TIMM.fullmatch(path.name):
            found.append(WeightFile(path=path, form="timm", model=f"nfnet_f{timm[1]}"))
        elif path.suffix == ".safetensors" or (path.is_dir() and is_folder(path)):
            found.append(WeightFile(path=path, form="described", model=None))
    if not found:
        raise ConfigError(
            f"weights = {str(folder)!r}: holds no weight file: put F0_haiku.npz, dm_nfnet_f0*.safetensors or what "
            "nfnet convert wrote into it"
        )
    return found


def images_in(root: str) -> SourceConfig:
    """The source of a validation set in any layout that `nfnet eval` recognises, or that `tools/prepare_imagenet.py`
    wrote; without `val/`, the folders of the classes lie in `root` itself. It is not opened.

    Raises:
      ConfigError: there is no such file or folder.
    """
    path = local_path("images", root)
    if not path.exists():
        raise ConfigError(
            f"images = {root!r}: does not exist: give a folder with val/ and a folder for each class in it"
        )
    if any(path.glob("*.array_record")):
        return ArrayRecordSource(train=(f"{path}/train-*.array_record",), eval=(f"{path}/eval-*.array_record",))
    found = evaluation_source("images", root)
    if isinstance(found, FolderSource) and not (path / found.eval).is_dir():
        return dataclasses.replace(found, eval=".")
    return found


def check_images(images: SourceConfig) -> None:
    """Opens a validation set, so that what is wrong with it is not said of the weights.

    Raises:
      ConfigError: it is incomplete, or holds no images.
      InputFailed: it cannot be read.
    """
    with reading("eval"):
        images.open("eval", 1)


def accuracy(file: WeightFile, images: SourceConfig) -> Accuracy:
    """Evaluates weights on all images of the held-out split.

    Weights that record how images are prepared are evaluated so, as by `nfnet eval`; all others as published: both
    sides resized to 32 px more than the test resolution of the network, then cropped.

    Raises:
      ConfigError: the weights are damaged, are of another network than their name says, or do not fit the images; the
        message names the file.
      InputFailed: the images cannot be read.
    """
    try:
        return _accuracy(file, images)
    except DoesNotFit as error:
        of_name = "" if file.model is None else f", and its name says {file.model}: rename it, or"
        remedy = f"{of_name or ':'} take it out of the folder ({'; '.join(error.lines)})"
        raise ConfigError(f"{file.path}: {error.said}{remedy}") from error
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if str(file.path) in said else f"{file.path}: {said}") from error


def _accuracy(file: WeightFile, images: SourceConfig) -> Accuracy:
    info, arrays = _opened(file)
    name = name_of(info.model)
    recorded = data_for(info, images)
    data = recorded
    if data is None:
        if name is None:
            raise ConfigError(
                f"weights {str(file.path)!r}: are of no named network and do not record how images are prepared: "
                "write them by nfnet convert run, or leave them out"
            )
        data = DataConfig(source=images, eval_image_size=IMAGE_SIZES[name].test, eval_crop_margin=_CROP_MARGIN)
    metrics = measure_weights(info, arrays, data).metrics
    return Accuracy(
        weights=file.path.name,
        model=name,
        image_size=data.eval_image_size,
        preparation="published" if recorded is None else "recorded",
        num_examples=int(metrics["num_examples"]),
        top1=metrics["top1"],
        top5=metrics["top5"],
    )


def _opened(file: WeightFile) -> tuple[WeightsInfo, HostArrays]:
    """Description and arrays; files of other projects are first converted, in a temporary folder."""
    if file.form == "described":
        return opened_weights(file.path)
    assert file.model is not None
    with tempfile.TemporaryDirectory() as folder:
        if file.form == "haiku":
            path = convert_haiku(file.path, file.model, folder, parameters="unknown")
        else:
            path = convert_timm(file.path, file.model, folder, parameters="unknown", timm_form=False)
        return opened_weights(path)
