"""The pass over the images of an evaluation that keeps what is predicted for each image."""

import collections
import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nfnet_flax.data.label_sets import Labelled
from nfnet_flax.models import Classifier
from nfnet_flax.objectives import Arrays, Batch, Objective
from nfnet_flax.parallel.mesh import to_global
from nfnet_flax.training.evaluation import (
    MAX_BATCHES_IN_FLIGHT,
    EvalStep,
    RowValues,
    Weights,
    check_any,
    metrics_of,
    say_left_out,
)
from nfnet_flax.training.predictions import Predictions, joined, predict

_LOGITS, _MIRRORED = "/logits", "/logits of the mirror images"
"""Names of a step's values that are not an objective's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of an evaluation of one set of parameters."""

    metrics: dict[str, float]
    """`top1`, `top5`, `loss`, `ece`, `num_examples`, and whatever else was measured; see `Predictions.metrics`."""
    predictions: Predictions
    """One row for each image."""
    labelled: Labelled
    """The images, and the names of the outputs."""
    weights: str
    """Where the weights come from."""


def row_values(objective: Objective | None, *, flip: bool) -> RowValues:
    """Computes, for `make_row_step`, the logits of images, with flip also those of their mirror images, and the values
    of an objective, if one is given."""

    def values(model: Classifier, images: jax.Array, batch: Batch) -> Arrays:
        logits = model(images)
        found = {} if objective is None else objective.evaluate(logits, batch)
        found = found | {_LOGITS: logits.astype(jnp.float32)}
        return found | {_MIRRORED: model(images[:, :, ::-1]).astype(jnp.float32)} if flip else found

    return values


@dataclasses.dataclass
class _Rows:
    """What was found so far for one set of weights."""

    predictions: list[Predictions] = dataclasses.field(default_factory=list)
    values: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    """Values of the objective, and `mask`, of each batch."""


def measure(
    step: EvalStep,
    weights_of: dict[str, Weights],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    labelled: Labelled,
    *,
    described: dict[str, str],
    counts_corrupt: bool,
    keeps_logits: bool = False,
) -> dict[str, Measurement]:
    """Evaluates several sets of weights over the same batches, in one process.

    Args:
      step: result of `make_row_step` with `row_values`.
      weights_of: name -> parameters and running statistics.
      batches: batches of `labelled.source`, with `mask`.
      mesh: mesh of the step.
      labelled: the images, and which outputs are right.
      described: name -> where the weights come from.
      counts_corrupt: whether images that cannot be decoded are left out: these are then counted, as `num_corrupt`.
      keeps_logits: whether the predictions have the logits.

    Returns:
      Name -> measurement. The values of an objective replace measures of the same name.

    Raises:
      ConfigError: there was no example to evaluate.
    """
    rows_of = {name: _Rows() for name in weights_of}
    waiting: collections.deque[tuple[np.ndarray, dict[str, Arrays]]] = collections.deque()
    masks: list[np.ndarray] = []

    def take() -> None:
        labels, found = waiting.popleft()
        first = sum(map(len, masks))
        for name, values in jax.device_get(found).items():
            _add(rows_of[name], values, labels, first, labelled, keeps_logits=keeps_logits)
        masks.append(rows_of[name].values[-1]["mask"])

    for rows in batches:
        batch = to_global(rows, mesh)
        waiting.append((rows["label"], {name: step(weights, batch) for name, weights in weights_of.items()}))
        if len(waiting) > MAX_BATCHES_IN_FLIGHT:  # limits the images that wait on the devices
            take()
    while waiting:
        take()
    mask = np.concatenate(masks or [np.zeros(0)])
    check_any(mask)
    counts = {"num_corrupt": float(say_left_out(labelled.source, mask))} if counts_corrupt else {}
    if labelled.num_unlabelled:
        counts["num_unlabelled"] = float(labelled.num_unlabelled)
    return {
        name: Measurement(
            metrics=_metrics(rows) | counts,
            predictions=joined(rows.predictions),
            labelled=labelled,
            weights=described[name],
        )
        for name, rows in rows_of.items()
    }


def _add(
    rows: _Rows,
    values: dict[str, np.ndarray],
    labels: np.ndarray,
    first: int,
    labelled: Labelled,
    *,
    keeps_logits: bool,
) -> None:
    """Adds the rows of a batch, whose first row is the example `first`."""
    logits = [values[name] for name in (_LOGITS, _MIRRORED) if name in values]
    rows.values.append({name: value for name, value in values.items() if name not in (_LOGITS, _MIRRORED)})
    counted = np.flatnonzero(values["mask"] > 0)
    if not counted.size:
        return
    right = (
        [labelled.right[first + row] for row in counted]
        if labelled.right is not None
        else [(int(labels[row]),) for row in counted]
    )
    of_counted = [each[counted] for each in logits]
    rows.predictions.append(predict(of_counted, right, first + counted, labelled.allowed, keeps_logits=keeps_logits))


def _metrics(rows: _Rows) -> dict[str, float]:
    measured = joined(rows.predictions).metrics()
    if rows.values[0].keys() == {"mask"}:
        return measured
    return measured | {name.split("/", 1)[1]: value for name, value in metrics_of("eval", rows.values).items()}
