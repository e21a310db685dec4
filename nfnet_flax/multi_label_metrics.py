"""Metrics of a whole held-out set whose images may have several classes, computed on the host with NumPy."""

import numpy as np


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Average precision of one class: the sum over all thresholds of precision times the increase of recall.

    Equal scores are one threshold, so the order of the examples does not matter; scikit-learn defines it so, too.

    Args:
      scores: (N,), higher for examples that are more likely of the class. NaN counts as the lowest score.
      is_positive: (N,) bool, of which at least one is True.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(is_positive[order], dtype=np.int64)
    is_last = np.append(ranked[1:] != ranked[:-1], True)
    found = hits[is_last]
    precision = found / (np.flatnonzero(is_last) + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])


def f1(is_predicted: np.ndarray, is_positive: np.ndarray) -> float:
    """Harmonic mean of precision and recall of one class, of which at least one example is positive."""
    return float(2 * np.sum(is_predicted & is_positive) / (np.sum(is_predicted) + np.sum(is_positive)))


def multi_label_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`mean_average_precision`, and `f1`, in which a class is predicted where its probability is above one half.

    Both are means over the classes (macro averages) of which the set has at least one example; 0 if it has none.

    Args:
      logits: (N, num_classes).
      labels: (N, num_classes) zeros and ones.
    """
    positive = labels > 0
    present = np.flatnonzero(np.any(positive, axis=0))
    if not present.size:
        return {"mean_average_precision": 0.0, "f1": 0.0}
    precisions = [average_precision(logits[:, column], positive[:, column]) for column in present]
    f1s = [f1(logits[:, column] > 0, positive[:, column]) for column in present]
    return {"mean_average_precision": float(np.mean(precisions)), "f1": float(np.mean(f1s))}
