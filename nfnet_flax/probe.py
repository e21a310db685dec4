"""Is a network worth fine-tuning? Logistic regression on its features takes a minute where training takes hours."""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError, require, require_count
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import eval_batches, open_split, say_unused
from nfnet_flax.data.random_access import Source, split_off
from nfnet_flax.finetuning import GivenImages, data_config, sizes_of
from nfnet_flax.messages import warn
from nfnet_flax.models import Classifier
from nfnet_flax.models.folding import fold
from nfnet_flax.progress import COMPUTING_LINE_S, track
from nfnet_flax.training.gradient import normalise
from nfnet_flax.weights import network_of
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import WeightsInfo

_BATCH = 32
_NUM_DRAWS = 3
"""Number of random choices of a few images per class, over which the accuracy is averaged."""
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Values of scikit-learn's `C`, of which cross-validation chooses one."""
_NUM_FOLDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """The result with some number of training images."""

    per_class: int | None
    """Number of training images of each class; None: all."""
    num_images: int
    """Number of training images in all."""
    top1: float
    """Share of the held-out images that are classified correctly; a mean over random choices of the images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The result of `probe`."""

    rows: tuple[ProbeRow, ...]
    """From the fewest images to all."""
    num_features: int
    """Number of features of an image."""
    num_held_out: int
    """Number of held-out images."""
    most_frequent: float
    """Share of the held-out images whose class is the most frequent one of the training images: what a classifier
    reaches that does not look at the images."""
    features_s: float
    """Time for reading the images and computing their features, in seconds."""
    fitting_s: float
    """Time for the regressions, in seconds."""


def probe(
    info: WeightsInfo,
    arrays: HostArrays,
    images: GivenImages,
    *,
    shots: Sequence[int] = (1, 5),
    max_train: int = 2000,
    max_held_out: int = 1000,
    on_corrupt: Literal["raise", "skip"] = "raise",
) -> ProbeResult:
    """Classifies images by logistic regression on the features of a network, which is not trained.

    Args:
      info: description of the weights.
      arrays: the weights.
      images: the images.
      shots: numbers of training images per class to try in addition to all images.
      max_train: largest number of training images; the first ones are used, whose order is random but fixed.
      max_held_out: largest number of held-out images.
      on_corrupt: what happens with an image that cannot be decoded. `raise`: it ends the probe. `skip`: it is left out,
        and a warning says how many are.

    Raises:
      ConfigError: an image may have several classes, there is only one class, or an image cannot be decoded
        (with `skip`: no image of a split can be).
      InputFailed: the images cannot be read.
    """
    for name, value in (("max_train", max_train), ("max_held_out", max_held_out), *(("shots", n) for n in shots)):
        require_count(name, value)
    if images.source.is_multi_label:
        raise ConfigError("a probe takes one class per image: leave the separator out, or fine-tune at once")
    started_s = time.perf_counter()
    _, seen_as = sizes_of(info)
    data = data_config(images, seen_as, train_size=seen_as.image_size, batch_size=_BATCH)
    data = dataclasses.replace(data, on_corrupt=on_corrupt)
    train = open_split(data, "train")
    held_out = open_split(data, "eval", train.class_names)
    say_unused(train, held_out)
    model = network_of(f"weights {info.source!r}", info, arrays)
    features_of = _Features(fold(model) if model.is_foldable else model, data)
    x, y = features_of(split_off(train, 0, min(len(train), max_train)), "training")
    x_held_out, y_held_out = features_of(split_off(held_out, 0, min(len(held_out), max_held_out)), "held-out")
    require(len(np.unique(y)) > 1, "max_train", max_train, "these images are all of one class: give more")
    mean, std = x.mean(axis=0), x.std(axis=0)
    x, x_held_out = ((part - mean) / np.where(std > 0, std, 1) for part in (x, x_held_out))
    counted_s = time.perf_counter()

    def top1(rows: np.ndarray) -> float:
        return float(np.mean(_fitted(x[rows], y[rows]).predict(x_held_out) == y_held_out))

    results = []
    for shot in sorted(set(shots)):
        if shot < np.max(np.bincount(y)):  # otherwise these are all images
            draws = [_few(y, shot, draw) for draw in range(_NUM_DRAWS)]
            mean_top1 = float(np.mean([top1(rows) for rows in draws]))
            results.append(ProbeRow(per_class=shot, num_images=len(draws[0]), top1=mean_top1))
    results.append(ProbeRow(per_class=None, num_images=len(y), top1=top1(np.arange(len(y)))))
    return ProbeResult(
        rows=tuple(results),
        num_features=x.shape[1],
        num_held_out=len(y_held_out),
        most_frequent=float(np.mean(y_held_out == np.argmax(np.bincount(y)))),
        features_s=counted_s - started_s,
        fitting_s=time.perf_counter() - counted_s,
    )


class _Features:
    """Computes the features of all images of a source."""

    def __init__(self, model: Classifier, data: DataConfig) -> None:
        structure, self._arrays = nnx.split(model)
        self._data = data

        def features(arrays: nnx.State, pixels: jax.Array) -> jax.Array:
            network: Classifier = nnx.merge(structure, arrays)
            return network.features(normalise(pixels, data.mean, data.std))

        self._compute = jax.jit(features)

    def __call__(self, source: Source, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """(N, num_features) float32 features and (N,) int32 labels of the images that can be decoded."""
        features, labels, masks = [], [], []
        with eval_batches(self._data, source, process_index=0, num_processes=1) as batches:
            num_batches = -(-len(source) // self._data.eval_batch_size)
            for rows in track(batches, "features", "batches", num_batches, first_line_s=COMPUTING_LINE_S):
                is_image = rows["mask"] > 0
                features.append(np.asarray(self._compute(self._arrays, rows["image"]), np.float32)[is_image])
                labels.append(rows["label"][is_image])
                masks.append(is_image)
        _say_left_out(source, np.concatenate(masks)[: len(source)], kind)
        found = np.concatenate(features)
        require(bool(np.all(np.isfinite(found))), "weights", "features", "are not finite: these weights are damaged")
        return found, np.concatenate(labels)


def _say_left_out(source: Source, is_image: np.ndarray, kind: str) -> None:
    """Warns if images of a split are left out; raises `ConfigError` if all are."""
    left_out = np.flatnonzero(~is_image)
    if not left_out.size:
        return
    first = source.describe(int(left_out[0]))
    if left_out.size == len(source):
        raise ConfigError(f"none of the {len(source)} {kind} images can be decoded; {first} is one: repair them")
    warn(
        f"{left_out.size} of the {len(source)} {kind} images cannot be decoded and are left out of the probe; the "
        f"first is {first}"
    )


def _few(labels: np.ndarray, per_class: int, draw: int) -> np.ndarray:
    """Indices of `per_class` random examples of each class, or of all of a class that has fewer."""
    order = np.random.default_rng(draw).permutation(len(labels))
    chosen = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.concatenate(chosen)


def _fitted(x: np.ndarray, y: np.ndarray) -> Any:  # scikit-learn has no types
    """A logistic regression, whose penalty cross-validation chooses if each class has several examples."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    plain = LogisticRegression(C=0.1, max_iter=300)
    fewest = int(np.min(np.unique(y, return_counts=True)[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy hardly changes after so many iterations
        if fewest < _NUM_FOLDS:
            return plain.fit(x, y)
        folds = StratifiedKFold(_NUM_FOLDS)
        return GridSearchCV(plain, {"C": list(_PENALTIES)}, cv=folds).fit(x, y)
