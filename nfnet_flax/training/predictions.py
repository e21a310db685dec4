"""What a network predicts for each image of an evaluation, and the measures that are computed from it, with NumPy."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_BINS = 15
"""Number of bins of the expected calibration error."""
_NUM_BEST = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """One row for each image; images that cannot be decoded have none. The best K = 5 outputs are kept, or all if the
    network has fewer."""

    index: np.ndarray
    """(N,) int64: index of the image in the source."""
    right: tuple[tuple[int, ...], ...]
    """For each row, the numbers of the right outputs."""
    best: np.ndarray
    """(N, K) int32: numbers of the outputs with the highest probability, the highest first; of equal ones, that with
    the lower number comes first."""
    probability: np.ndarray
    """(N, K) float64: the probabilities of `best`."""
    loss: np.ndarray
    """(N,) float64: minus the logarithm of the probability of the right outputs together, that is, the cross-entropy
    if one output is right. Not finite if logits are not."""
    logits: np.ndarray | None = None
    """(N, C) float32, if they are asked for: the outputs of the network, or with flip the mean over both images."""

    @property
    def hits(self) -> np.ndarray:
        """(N, K) bool: whether each of the best outputs is a right one. Rows whose loss is not finite have none."""
        width = max(map(len, self.right))
        padded = np.array([[*row, *row[:1] * (width - len(row))] for row in self.right], np.int32)
        found = np.any(self.best[:, :, None] == padded[:, None, :], axis=2)
        return found & np.isfinite(self.loss)[:, None]

    def metrics(self) -> dict[str, float]:
        """`top1`, `top5`, `loss`, `ece` (`calibration_error`) and `num_examples`."""
        hits = self.hits
        return {
            "top1": float(np.mean(hits[:, 0])),
            "top5": float(np.mean(np.any(hits, axis=1))),
            "loss": float(np.mean(self.loss)),
            "ece": self.ece(),
            "num_examples": float(len(self.index)),
        }

    def ece(self) -> float:
        """`calibration_error` of the best output; rows whose loss is not finite count as certain and wrong."""
        confidence = np.where(np.isfinite(self.loss), self.probability[:, 0], 1.0)
        return calibration_error(confidence, self.hits[:, 0])

    def per_class(self, num_outputs: int) -> "list[ClassAccuracy]":
        """The accuracy for each output that is right for at least one image, in the order of the outputs."""
        hits = self.hits
        counts, first, any_of = (np.zeros(num_outputs, np.int64) for _ in range(3))
        for row, labels in enumerate(self.right):
            chosen = list(labels)
            counts[chosen] += 1
            first[chosen] += hits[row, 0]
            any_of[chosen] += hits[row].any()
        return [
            ClassAccuracy(int(label), int(counts[label]), int(first[label]), int(any_of[label]))
            for label in np.flatnonzero(counts)
        ]

    def confusion(self, outputs: Sequence[int]) -> np.ndarray:
        """Number of images for each right output (rows) and best output (columns).

        Args:
          outputs: numbers of the outputs, in the order of rows and columns; all that are right or best for an image.
        """
        place = {label: number for number, label in enumerate(outputs)}
        found = np.zeros((len(outputs), len(outputs)), np.int64)
        for labels, best in zip(self.right, self.best[:, 0].tolist(), strict=True):
            (label,) = labels
            found[place[label], place[best]] += 1
        return found


class ClassAccuracy(NamedTuple):
    """The accuracy on the images for which one output is right."""

    label: int
    """Number of the output."""
    num_examples: int
    """Number of images for which it is right."""
    num_top1: int
    """Number of these for which the best output is a right one."""
    num_top5: int
    """Number of these for which one of the best five outputs is a right one."""


def calibration_error(confidence: np.ndarray, is_right: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error (arXiv 1706.04599, equation 3).

    The images are sorted by the probability of their best output into bins of equal width, of which bin m of M holds
    those in ((m - 1) / M, m / M]. The error is the mean over the images of the distance, in their bin, between the
    share of right predictions and the mean probability.

    Args:
      confidence: (N,) probability of the best output of each image.
      is_right: (N,) whether that output is a right one.
      num_bins: M.
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    distance = np.bincount(bins, confidence - is_right, minlength=num_bins)
    return float(np.sum(np.abs(distance)) / len(confidence))


def predict(
    logits: Sequence[np.ndarray],
    right: Sequence[tuple[int, ...]],
    index: np.ndarray,
    allowed: Sequence[int] | None = None,
    *,
    keeps_logits: bool = False,
) -> Predictions:
    """The predictions for some images.

    Args:
      logits: (N, C) for the images and, with flip, the same for their mirror images. The probabilities are the mean of
        the softmax over each of them.
      right: numbers of the right outputs of each image.
      index: (N,) index of each image in the source.
      allowed: numbers of the outputs that count, sorted; None: all. The others are left out before the softmax.
      keeps_logits: whether the result has the logits.
    """
    num_outputs = logits[0].shape[1]
    chosen = np.arange(num_outputs) if allowed is None else np.asarray(allowed)
    found = [np.asarray(each, np.float64) for each in logits]
    probabilities = np.mean([_softmax(each[:, chosen]) for each in found], axis=0)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :_NUM_BEST]
    with np.errstate(invalid="ignore"):  # logits that are not finite
        loss = np.log(len(found)) - np.logaddexp.reduce([_log_right(each, chosen, right) for each in found])
    return Predictions(
        index=np.asarray(index, np.int64),
        right=tuple(right),
        best=chosen[order].astype(np.int32),
        probability=np.take_along_axis(probabilities, order, axis=1),
        loss=np.asarray(loss, np.float64),
        logits=np.mean(np.asarray(logits, np.float32), axis=0) if keeps_logits else None,
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):  # logits that are not finite
        shifted = np.exp(logits - np.max(logits, axis=1, keepdims=True))
        found: np.ndarray = shifted / np.sum(shifted, axis=1, keepdims=True)
    return found


def _log_right(logits: np.ndarray, chosen: np.ndarray, right: Sequence[tuple[int, ...]]) -> np.ndarray:
    """(N,) logarithm of the probability, among the chosen outputs, of the right ones together.

    It is finite for all finite logits, also where the probability itself would be rounded to 0.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.logaddexp.reduce(logits[:, chosen], axis=1)
        of_right = [np.logaddexp.reduce(row[list(labels)]) for row, labels in zip(logits, right, strict=True)]
        found: np.ndarray = np.asarray(of_right) - total
    return found


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The rows of several predictions, one after the other."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Predictions(
        index=np.concatenate([part.index for part in parts]),
        right=tuple(labels for part in parts for labels in part.right),
        best=np.concatenate([part.best for part in parts]),
        probability=np.concatenate([part.probability for part in parts]),
        loss=np.concatenate([part.loss for part in parts]),
        logits=np.concatenate(logits) if logits else None,
    )
