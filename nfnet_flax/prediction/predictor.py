"""Predictions: images are decoded by threads ahead of the device, which computes batches of one size."""

import contextlib
import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnet_flax.config import require, require_count
from nfnet_flax.data.decode import CorruptImageError
from nfnet_flax.models import Classifier
from nfnet_flax.prediction.images import AnyImage, Images, Prepared, Unreadable, prepare
from nfnet_flax.weights import Preprocessing
from nfnet_flax.weights.portable import Activation

_BATCH = "batch"
"""Name of the mesh axis over which the rows of a batch are divided."""
_MAX_BATCH_SIZE = 1 << 16
_MAX_THREADS = 8
_NOT_FINITE = "the network's outputs for it are not finite"
_Compute = Callable[[nnx.State, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The probabilities of all classes for one image."""

    source: str
    """The path of the image as it was given, or `images[3]` for the fourth of several arrays."""
    names: tuple[str, ...]
    """Names of the classes, in the order of the network's outputs."""
    probabilities: np.ndarray
    """(C,) float32: the probability of each class."""
    thumbnail: bytes | None = None
    """The whole image, small, as a JPEG file; None if it was not asked for."""

    def top(self, count: int = 5) -> tuple[tuple[str, float], ...]:
        """Names and probabilities of the most probable classes, the most probable first.

        Args:
          count: number of classes; all, if there are fewer.

        Raises:
          ConfigError: it is less than 1.
        """
        require_count("count", count)
        best = np.argsort(-self.probabilities, kind="stable")[:count]
        return tuple((self.names[index], float(self.probabilities[index])) for index in best)


class Predictor:
    """Predicts classes of images; `load_predictor` makes it."""

    def __init__(
        self,
        network: Classifier,
        *,
        names: tuple[str, ...],
        preprocessing: Preprocessing,
        activation: Activation,
        source: str,
        batch_size: int = 32,
    ) -> None:
        """Puts the network on the devices of this process.

        Args:
          network: the network in evaluation mode, for RGB images.
          names: names of its outputs, in order.
          preprocessing: how images are prepared.
          activation: what makes probabilities of the logits.
          source: description of where the weights come from.
          batch_size: number of images that are computed at a time. If there are fewer in all, the smallest power of two
            that is enough takes its place.

        Raises:
          ConfigError: the batch size is not positive, or too large.
        """
        is_integer = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        require(is_integer, "batch_size", batch_size, "give an integer")
        require_count("batch_size", batch_size, most=_MAX_BATCH_SIZE)
        self.network, self.names, self.preprocessing = network, names, preprocessing
        self.activation, self.source, self.batch_size = activation, source, batch_size
        devices = jax.local_devices()
        count = next(count for count in range(len(devices), 0, -1) if batch_size % count == 0)
        self._mesh = Mesh(np.asarray(devices[:count]), (_BATCH,))
        structure, state = nnx.split(network)
        self._state = jax.device_put(state, NamedSharding(self._mesh, PartitionSpec()))
        mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))

        def logits(state: nnx.State, images: jax.Array) -> jax.Array:
            outputs: jax.Array = nnx.merge(structure, state)((images.astype(jnp.float32) - mean) / std)
            return outputs

        def features(state: nnx.State, images: jax.Array) -> jax.Array:
            outputs: jax.Array = nnx.merge(structure, state).features((images.astype(jnp.float32) - mean) / std)
            return outputs

        self._logits, self._features = jax.jit(logits), jax.jit(features)

    def __call__(self, images: Images) -> list[Prediction]:
        """Predicts the classes of images.

        Args:
          images: paths of files, encoded bytes, and arrays (H, W, 3) of uint8, RGB, of any sizes, also mixed.

        Raises:
          ConfigError: it is no sequence of images, or an image cannot be read or decoded; see `stream`.
        """
        found = []
        for result in self.stream(_checked(images)):
            if isinstance(result, Unreadable):
                raise CorruptImageError(f"{result.source}: {result.reason}")
            found.append(result)
        return found

    def stream(
        self, images: Iterable[AnyImage | Unreadable], *, thumbnail_px: int | None = None
    ) -> Generator[Prediction | Unreadable, None, None]:
        """Predictions one after the other, in the order of the images; memory does not depend on their number.

        Args:
          images: as for a call, or such as `find_images` finds.
          thumbnail_px: longer side of `Prediction.thumbnail`, in pixels; None: there is none.

        Yields:
          A `Prediction`, or `Unreadable` for an image that cannot be read or decoded.
        """
        for row in self._rows(images, self._logits, thumbnail_px):
            if isinstance(row, Unreadable):
                yield row
                continue
            prepared, logits = row
            if not np.all(np.isfinite(logits)):
                yield Unreadable(prepared.source, _NOT_FINITE)
                continue
            probabilities = _probabilities(logits, self.activation)
            yield Prediction(prepared.source, self.names, probabilities, prepared.thumbnail)

    def logits(self, images: Images) -> np.ndarray:
        """Logits, (N, C) float32; arguments and errors as for a call."""
        return self._stacked(images, self._logits, self.network.num_classes)

    def features(self, images: Images) -> np.ndarray:
        """Pooled features, (N, num_features) float32; arguments and errors as for a call."""
        return self._stacked(images, self._features, self.network.num_features)

    def _stacked(self, images: Images, compute: _Compute, width: int) -> np.ndarray:
        found = []
        for row in self._rows(_checked(images), compute, None):
            if isinstance(row, Unreadable):
                raise CorruptImageError(f"{row.source}: {row.reason}")
            found.append(row[1])
        return np.stack(found) if found else np.zeros((0, width), np.float32)

    def _rows(
        self, images: Iterable[AnyImage | Unreadable], compute: _Compute, thumbnail_px: int | None
    ) -> Iterator[tuple[Prepared, np.ndarray] | Unreadable]:
        """Each image with the network's output for it, in order. One batch is computed while the next is decoded."""
        num_rows = 0
        last: tuple[list[Prepared | Unreadable], jax.Array | None] = [], None
        with contextlib.closing(_prepared(images, self.preprocessing, thumbnail_px, 2 * self.batch_size)) as prepared:
            while batch := list(itertools.islice(prepared, self.batch_size)):
                # All batches have the size of the first one, so that only one program is compiled.
                num_rows = num_rows or min(self.batch_size, 1 << (len(batch) - 1).bit_length())
                outputs = None
                if any(isinstance(item, Prepared) for item in batch):
                    outputs = compute(self._state, self._on_devices(batch, num_rows))
                yield from _paired(*last)
                last = batch, outputs
        yield from _paired(*last)

    def _on_devices(self, batch: list[Prepared | Unreadable], num_rows: int) -> jax.Array:
        """(num_rows, S, S, 3) uint8; rows without an image are black."""
        size = self.preprocessing.image_size
        images = np.zeros((num_rows, size, size, 3), np.uint8)
        for row, item in enumerate(batch):
            if isinstance(item, Prepared):
                images[row] = item.crop
        is_divided = num_rows % self._mesh.size == 0
        spec = PartitionSpec(_BATCH) if is_divided else PartitionSpec()
        return jax.device_put(images, NamedSharding(self._mesh, spec))


def _checked(images: Images) -> Images:
    """Several images; raises `ConfigError` for a single one, whose parts would be taken for images."""
    is_single = isinstance(images, str | bytes | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim != 4)
    given = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else images
    require(not is_single, "images", given, "give a list of images, also for a single one: [image]")
    return images


def _prepared(
    images: Iterable[AnyImage | Unreadable], preprocessing: Preprocessing, thumbnail_px: int | None, num_ahead: int
) -> Generator[Prepared | Unreadable, None, None]:
    """Images in their order, decoded by threads; at most `num_ahead` are decoded before they are wanted."""
    threads = ThreadPoolExecutor(min(_MAX_THREADS, max(2, os.cpu_count() or 1)), "decode")
    waiting: deque[Future[Prepared | Unreadable]] = deque()
    try:
        for index, image in enumerate(images):
            waiting.append(threads.submit(prepare, image, index, preprocessing, thumbnail_px))
            if len(waiting) >= num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _paired(
    batch: list[Prepared | Unreadable], outputs: jax.Array | None
) -> Iterator[tuple[Prepared, np.ndarray] | Unreadable]:
    rows = np.zeros((0, 0)) if outputs is None else np.asarray(outputs)
    for row, item in enumerate(batch):
        yield item if isinstance(item, Unreadable) else (item, rows[row])


def _probabilities(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """(C,) float32 of (C,) logits."""
    wide = logits.astype(np.float64)
    if activation == "sigmoid":
        return np.exp(-np.logaddexp(0.0, -wide)).astype(np.float32)  # also small ones are exact
    powers = np.exp(wide - wide.max())
    return (powers / powers.sum()).astype(np.float32)
