"""What an evaluation finds for each held-out example besides its metrics: which class is predicted, and how surely.

The step of the evaluation computes these values with the metrics, from the same outputs of the network, so they need no
further pass over the images. Every process gets those of all processes.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_LABEL, _PREDICTED, _PROBABILITY = "/label", "/predicted", "/probability"
"""Names of the values of a step. No name of an objective's value begins with a slash."""
NO_CLASS = -1
"""Predicted class of an example whose loss is not finite: it is counted as wrong, as in the metrics."""


def outcome_values(logits: jax.Array, label: jax.Array, *, is_softmax: bool) -> dict[str, jax.Array]:
    """Values of each row of a batch, for `outcomes_of`; none if an example may have several classes.

    Args:
      logits: (N, C).
      label: (N,) number of the class of each row; with several classes (N, C).
      is_softmax: whether probabilities are a softmax over the logits; if not, the sigmoid of each.
    """
    if label.ndim != 1:
        return {}
    logits = logits.astype(jnp.float32)
    probabilities = jax.nn.softmax(logits) if is_softmax else jax.nn.sigmoid(logits)
    return {
        _LABEL: label,
        _PREDICTED: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        _PROBABILITY: jnp.max(probabilities, axis=-1),
    }


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """One row for each held-out example that was evaluated, in their order."""

    index: np.ndarray
    """(N,) int64: index of the example in the held-out set."""
    label: np.ndarray
    """(N,) int32: its class."""
    predicted: np.ndarray
    """(N,) int32: the class with the highest output, or `NO_CLASS`."""
    probability: np.ndarray
    """(N,) float32: the probability of `predicted`."""

    @property
    def is_right(self) -> np.ndarray:
        """(N,) bool."""
        found: np.ndarray = self.predicted == self.label
        return found

    def per_class(self, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of examples of each class, and how many of them are predicted right; both (num_classes,) int64."""
        counts = np.bincount(self.label, minlength=num_classes)
        return counts, np.bincount(self.label[self.is_right], minlength=num_classes)

    def confusion(self, num_classes: int) -> np.ndarray:
        """Number of examples of each class (rows) for which each class was predicted (columns).

        The last column, for whatever is none of the classes, is only there if it is not empty:
        (num_classes, num_classes) or (num_classes, num_classes + 1) int64.
        """
        is_class = (self.predicted >= 0) & (self.predicted < num_classes)
        column = np.where(is_class, self.predicted, num_classes)
        found = np.zeros((num_classes, num_classes + 1), np.int64)
        np.add.at(found, (self.label, column), 1)
        return found if found[:, -1].any() else found[:, :-1]

    def most_confidently_wrong(self, count: int) -> np.ndarray:
        """Row numbers of the wrong predictions with the highest probabilities, the highest first; at most `count`."""
        wrong = np.flatnonzero(~self.is_right & (self.predicted != NO_CLASS))
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count]


def outcomes_of(batches: Sequence[dict[str, np.ndarray]]) -> Outcomes | None:
    """The outcomes of an evaluation.

    Args:
      batches: for each batch, the values of `outcome_values`, `mask` and `loss`, each (rows,).

    Returns:
      None if an example may have several classes.
    """
    if not batches or _LABEL not in batches[0]:
        return None
    names = (_LABEL, _PREDICTED, _PROBABILITY, "mask", "loss")
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    index = np.flatnonzero(whole["mask"] > 0)
    label, predicted, probability, loss = (whole[name][index] for name in (_LABEL, _PREDICTED, _PROBABILITY, "loss"))
    return Outcomes(index, label, np.where(np.isfinite(loss), predicted, NO_CLASS), probability)
