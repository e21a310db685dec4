"""The networks and the images that `nfnet signal` measures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError, require, unknown_name
from nfnet_flax.data.pipeline import check_batches_fit, eval_batches, open_split, say_unused
from nfnet_flax.data.random_access import check_memory
from nfnet_flax.finetuning import sizes_of
from nfnet_flax.messages import warn
from nfnet_flax.models import Classifier, build_model, list_models, model_config
from nfnet_flax.models.keys import initial_key
from nfnet_flax.paths import hub_name, is_missing
from nfnet_flax.prediction import Unreadable, find_images
from nfnet_flax.prediction.images import Prepared, prepare
from nfnet_flax.telemetry.signal import unit_noise
from nfnet_flax.training.reading import Parameters, Run, Which, is_run, weights_at
from nfnet_flax.training.run_folder import place_of
from nfnet_flax.weights import WeightsInfo, network_of, open_weights
from nfnet_flax.weights.entries import HostArrays

_FIELD = "network"
_NUM_THREADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """What the command line names."""

    info: WeightsInfo
    """The network, and how its images are prepared."""
    arrays: HostArrays | None
    """Its weights; None: only the network is named."""
    run: Run | None
    """The run whose weights they are; None: they are of no run."""

    @property
    def seed(self) -> int:
        """Seed of the run, or 0."""
        return 0 if self.run is None else self.run.recipe.seed

    def initial(self, seed: int) -> Classifier:
        """The network with random parameters: those with which a run of this seed begins."""
        return build_model(self.info.model, num_classes=self.info.num_classes, rngs=nnx.Rngs(params=initial_key(seed)))

    def trained(self) -> Classifier | None:
        """The network with its weights, if they are named."""
        return None if self.arrays is None else network_of(f"{self.info.source},", self.info, self.arrays)


class Input(NamedTuple):
    """The images on which a network is measured."""

    images: np.ndarray
    """(N, size, size, channels) float32, normalised."""
    text: str
    """What they are, how many, and of which size."""
    is_noise: bool = False
    """Whether they are noise."""


def named(reference: str, *, parameters: Parameters | None, checkpoint: Which | None) -> Named:
    """The network that a user names.

    Args:
      reference: a name that `nfnet models` lists; or the folder of a run, a weight file, a folder with timm's
        `config.json`, or a name in a model hub.
      parameters: which parameters of a run; None: the EMA.
      checkpoint: which checkpoint of a run; None: the newest.

    Raises:
      ConfigError: there is nothing of this name, it is damaged, or the other arguments are given and it is not a run.
      StorageFailed, HubUnreachable: as for `weights_of`.
    """
    found = _found(reference, parameters, checkpoint)
    for name, value in (("parameters", parameters), ("checkpoint", checkpoint)):
        require(value is None or found.run is not None, name, value, "is for a run: leave it out")
    return found


def _found(reference: str, parameters: Parameters | None, checkpoint: Which | None) -> Named:
    if reference in list_models():
        info = WeightsInfo(model=model_config(reference), num_classes=1000, source=reference, parameters="unknown")
        return Named(info=info, arrays=None, run=None)
    if hub_name(reference) is None:
        place = place_of(_FIELD, reference)
        if isinstance(place, Path) and Path(reference).name == reference and is_missing(place):
            unknown = unknown_name("model", reference, list_models(), listed_by="nfnet models")
            raise ConfigError(f"{unknown}; and there is no file or folder of this name")
        if is_run(_FIELD, reference):
            run = Run(reference, field=_FIELD)
            _, info, arrays = weights_at(run, parameters or "ema", "newest" if checkpoint is None else checkpoint)
            return Named(info=info, arrays=arrays, run=run)
    info, arrays = open_weights(reference, field=_FIELD)
    return Named(info=info, arrays=arrays, run=None)


def noise(network: Named, *, count: int, image_size: int | None, seed: int) -> Input:
    """Unit Gaussian noise of the size of the network's images.

    Raises:
      ConfigError: the size is neither given nor known.
    """
    size = image_size
    if size is None:
        try:
            sizes, seen_as = sizes_of(network.info)
        except ConfigError as error:
            raise ConfigError(f"{error}; or give --image-size") from error
        size = sizes.train if network.arrays is None else seen_as.image_size
    channels = network.info.model.in_channels
    num_bytes = count * size * size * channels * 4
    check_memory("batch_size", count, num_bytes, f"{count:,} images of {size} px")
    images = unit_noise(count, size, channels=channels, seed=seed)
    return Input(images, f"unit Gaussian noise, seed {seed}, {_size(images)}", is_noise=True)


def given_images(network: Named, places: Sequence[str], *, count: int, image_size: int | None, seed: int) -> Input:
    """At most `count` images of files, folders and patterns, chosen at random, prepared as the network expects it.

    Raises:
      ConfigError: there are none, one cannot be decoded, or the network is for images of other channels.
    """
    _check_channels(network)
    _, seen_as = sizes_of(network.info)
    if image_size is not None:
        seen_as = dataclasses.replace(seen_as, image_size=image_size)
    files = find_images(places)
    found = list(files)
    for text in files.unused:
        warn(text)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(found))[:count])
    crops = [_crop(prepare(found[index], int(index), seen_as, None)) for index in chosen]
    images = _normalised(np.stack(crops), seen_as.mean, seen_as.std)
    return Input(images, f"{_size(images)} of {', '.join(places)}")


def _crop(prepared: Prepared | Unreadable) -> np.ndarray:
    if isinstance(prepared, Unreadable):
        raise ConfigError(f"images = {prepared.source!r}: {prepared.reason}")
    return prepared.crop


def held_out_images(network: Named, *, count: int, image_size: int | None) -> Input:
    """The first held-out images of a run, prepared as in its evaluation.

    Raises:
      ConfigError: it is not a run, or its images are not there or cannot be decoded.
      InputFailed: they cannot be read.
    """
    run = network.run
    require(run is not None, "held_out", True, "is for a run: give its folder, or --images FILE|FOLDER ...")
    assert run is not None
    _check_channels(network)
    data = run.recipe.data
    data = dataclasses.replace(
        data,
        eval_batch_size=count,
        eval_image_size=data.eval_image_size if image_size is None else image_size,
        num_workers=0,
        num_threads=_NUM_THREADS,
    )
    check_batches_fit(data, ("eval",), num_processes=1)
    source = open_split(data, "eval", run.class_names)
    say_unused(source)
    with eval_batches(data, source, process_index=0, num_processes=1) as batches:
        rows = next(iter(batches))
    is_image = rows["mask"] > 0
    require(bool(is_image.any()), "held_out", True, f"none of the first {count} images can be decoded")
    images = _normalised(rows["image"][is_image], data.mean, data.std)
    return Input(images, f"the first held-out images of the run, {_size(images)}")


def _check_channels(network: Named) -> None:
    channels = network.info.model.in_channels
    require(channels == 3, "model.in_channels", channels, "images have 3 channels: measure this network on noise")


def _normalised(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Float32 input of a network of grey levels (0 to 255)."""
    found: np.ndarray = (pixels.astype(np.float32) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return found


def _size(images: np.ndarray) -> str:
    return f"{len(images)} images of {images.shape[2]} x {images.shape[1]} px"
