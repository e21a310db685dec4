"""Evaluation: every held-out example exactly once, for raw and EMA parameters."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.random_access import Source
from nfnet_flax.messages import warn
from nfnet_flax.models import Classifier, convolution
from nfnet_flax.models.layers import DTYPES
from nfnet_flax.models.params import BatchStats, Params, cast, merge
from nfnet_flax.models.preparation import prepare
from nfnet_flax.objectives import Batch, Objective
from nfnet_flax.parallel.mesh import BATCH_AXES, count_turns, partition_spec, replicated, to_global
from nfnet_flax.parallel.reduce import Arrays, gathered
from nfnet_flax.parallel.rounding import separately_rounded
from nfnet_flax.parallel.turns import bound_to_turn, cut_rows, stack_of_turns
from nfnet_flax.telemetry.outcomes import Outcomes, outcome_values, outcomes_of
from nfnet_flax.training.gradient import normalise
from nfnet_flax.training.shares import shares_of
from nfnet_flax.training.state import Structure, TrainState

Weights = tuple[Params, BatchStats]
"""Parameters and running statistics of a network."""
MAX_BATCHES_IN_FLIGHT = 2
"""Batches after which an evaluation waits, as each has its images in the memory of the devices."""
EvalStep = Callable[[Weights, Batch], Arrays]
RowValues = Callable[[Classifier, jax.Array, Batch], Arrays]
"""Computes arrays with a first axis of N rows, by name, from a network in evaluation mode, its N normalised images, and
the batch. It is traced by JAX."""


Finish = Callable[[Arrays, Batch], Arrays]
"""Converts the values of all rows of a device, given its part of the batch."""
_LOGITS = "/logits"
"""Name of a value that is only there within a step."""
Summarize = Callable[[dict[str, np.ndarray]], dict[str, float]]
"""`Objective.summarize`."""
Observe = Callable[[dict[str, Outcomes]], None]
"""Called with what was predicted for each example, by the prefix of the metrics."""


def evaluated_names(objective: Objective, num_classes: int, *, is_multi_label: bool = False) -> tuple[str, ...]:
    """Names of the metrics of an evaluation with an objective; computes nothing.

    Args:
      objective: the objective.
      num_classes: number of outputs of the network.
      is_multi_label: whether labels are rows of zeros and ones.

    Raises:
      ConfigError: `loss` is not among them, or a value is not an array with one entry for each example.
    """
    rows = 2
    label = jax.ShapeDtypeStruct((rows, num_classes), jnp.uint8) if is_multi_label else None
    batch = {
        "image": jax.ShapeDtypeStruct((rows, 8, 8, 3), jnp.uint8),
        "label": label or jax.ShapeDtypeStruct((rows,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    found = jax.eval_shape(objective.evaluate, jax.ShapeDtypeStruct((rows, num_classes), jnp.float32), batch)
    called = f"{type(objective).__name__}.evaluate"
    require("loss" in found, called, sorted(found), "must also return loss: the loss of each example")
    require("mask" not in found, called, sorted(found), "mask says which examples count: choose another name")
    is_named = not any(map(_is_outcome, found))
    require(is_named, called, sorted(found), "names that begin with / are taken: choose another one")
    remedy = "must be (N,), one number for each example, or (N, ...) for `summarize`"
    for name, value in found.items():
        is_number = name == "loss" and value.shape != (rows,)
        require(value.shape[:1] == (rows,) and not is_number, f"{called}: {name}", f"of shape {value.shape}", remedy)
    zeros = {name: np.zeros(value.shape, value.dtype) for name, value in found.items() if value.ndim > 1}
    return (*(name for name in found if name not in zeros), *objective.summarize(zeros))


def make_eval_step(structure: Structure, objective: Objective, mesh: Mesh) -> jax.stages.Wrapped:
    """Builds `step(weights, batch)`, which returns the values of `objective.evaluate` and `outcome_values`, all of them
    on every device.

    Raises:
      ConfigError: as for `evaluated_names`.
    """
    evaluated_names(objective, structure.num_classes)
    is_softmax = objective.activation == "softmax"

    def values(model: Classifier, images: jax.Array, batch: Batch) -> Arrays:
        logits = model(images)
        return objective.evaluate(logits, batch) | {_LOGITS: logits}

    def with_outcomes(rows: Arrays, batch: Batch) -> Arrays:
        logits = rows.pop(_LOGITS)
        return rows | outcome_values(logits, batch["label"], is_softmax=is_softmax)

    return make_row_step(structure, values, mesh, with_outcomes)


def _is_outcome(name: str) -> bool:
    return name.startswith("/")


def make_row_step(
    structure: Structure, values: RowValues, mesh: Mesh, finish: Finish = lambda rows, _: rows
) -> jax.stages.Wrapped:
    """Builds `step(weights, batch)`, which returns values of each row and `mask`, all of them on every device.

    Rows are computed in as many parts as the training batch has, so that rounding does not depend on the number of
    devices.

    Args:
      structure: structure of the network, and how it is computed.
      values: computes the values of the rows of one part.
      mesh: mesh over whose devices the batch is divided.
      finish: converts the values of the rows of a device. It is not part of the loop over the parts, so it does not
        change how the values are rounded.
    """
    config, execution = structure.config, structure.execution
    mean, std = structure.normalization.mean, structure.normalization.std
    platform = mesh.devices.flat[0].platform
    num_turns = count_turns(execution.num_microbatches, mesh)
    is_alike = structure.num_parts is not None and platform != "tpu"

    def part(prepared: Params, batch_stats: BatchStats, batch: Batch) -> Arrays:
        model = merge(structure.prepared, prepared, batch_stats)
        model.eval()
        with convolution.for_platform(platform):
            return values(model, normalise(batch["image"], mean, std), batch)

    axes = structure.sharded_axes(mesh)

    def local(params: Params, batch_stats: BatchStats, batch: Batch) -> Arrays:
        division = shares_of(structure, mesh, batch["mask"][0])
        share, _ = prepare(params, structure.standardization, division)
        prepared = gathered(cast(share, DTYPES[config.compute_dtype]), axes)
        parts = cut_rows(batch, num_turns, is_alike=is_alike)

        def turn(index: jax.Array) -> Arrays:
            rows = jax.tree.map(lambda rows: rows[index], parts)
            own_weights, rows = bound_to_turn((prepared, rows), index)
            return part(own_weights, batch_stats, rows)

        found = stack_of_turns(turn, num_turns, batch["mask"][0])
        rows_of = {name: value.reshape(-1, *value.shape[2:]) for name, value in found.items()}  # of all turns
        finished = finish(rows_of, batch)
        return {name: lax.all_gather(value, BATCH_AXES, tiled=True) for name, value in finished.items()}

    if structure.num_parts is not None:
        local = separately_rounded(local, lambda params, batch_stats, batch: batch["mask"][0], platform)
    per_device = jax.shard_map(
        local,
        mesh=mesh,
        axis_names=set(BATCH_AXES),
        in_specs=(
            {name: partition_spec(axis) for name, axis in axes.items()},
            PartitionSpec(),
            PartitionSpec(BATCH_AXES),
        ),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def step(weights: Weights, batch: Batch) -> Arrays:
        params, batch_stats = weights
        found = per_device(params, batch_stats, batch)
        return found | {"mask": lax.with_sharding_constraint(batch["mask"], replicated(mesh))}

    return jax.jit(step)


def weights_to_evaluate(state: TrainState) -> dict[str, Weights]:
    """Prefix of the metrics -> raw or EMA weights of a state."""
    return {
        "eval": (state.params, state.batch_stats),
        "eval_ema": (state.ema_params, state.ema_batch_stats),
    }


def run_evaluation(
    eval_step: EvalStep,
    weights_of: dict[str, Weights],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    is_stopped: Callable[[], bool] | None = None,
    *,
    counted_in: Source | None = None,
    summarize: Summarize | None = None,
    observe: Observe | None = None,
) -> dict[str, float] | None:
    """Metrics of several sets of weights over the same batches.

    Args:
      eval_step: result of `make_eval_step`.
      weights_of: prefix of the metrics (`eval`, `eval_ema`) -> parameters and running statistics.
      batches: this process's rows, with `mask`.
      mesh: mesh of the step.
      is_stopped: called before each batch; if it returns True, the evaluation ends early. It must return the same in
        all processes.
      counted_in: the source of the batches, if images that cannot be decoded are left out: these are then counted, and
        if there are any, process 0 prints a warning.
      summarize: makes further metrics of those values of the step that are not one number for each example; None: these
        values are not used.
      observe: gets the outcomes, if each example has one class and the evaluation was not stopped.

    Returns:
      The objective's metrics as `{prefix}/top1`, `{prefix}/loss` and so on, and `eval/num_examples`, with `counted_in`
      also `eval/num_corrupt`; None if the evaluation was stopped. Only the loss may be not finite, if logits overflow;
      the other values of such an example count as 0.

    Raises:
      ConfigError: there was no example to evaluate.
    """
    found: list[dict[str, Arrays]] = []
    for rows in batches:
        if is_stopped is not None and is_stopped():
            return None
        batch = to_global(rows, mesh)
        found.append({prefix: eval_step(weights, batch) for prefix, weights in weights_of.items()})
        if len(found) > MAX_BATCHES_IN_FLIGHT:  # limits the images that wait on the devices
            jax.block_until_ready(found[-1 - MAX_BATCHES_IN_FLIGHT])
    batches_of: list[dict[str, dict[str, np.ndarray]]] = jax.device_get(found)
    metrics = {
        name: value
        for prefix in weights_of
        for name, value in metrics_of(prefix, [batch[prefix] for batch in batches_of], summarize).items()
    }
    if observe is not None:
        outcomes = {prefix: outcomes_of([batch[prefix] for batch in batches_of]) for prefix in weights_of}
        observe({prefix: each for prefix, each in outcomes.items() if each is not None})
    if counted_in is not None:
        masks = [next(iter(batch.values()))["mask"] for batch in batches_of]
        metrics["eval/num_corrupt"] = float(say_left_out(counted_in, np.concatenate(masks)))
    return metrics


def say_left_out(source: Source, mask: np.ndarray) -> int:
    """Number of examples that are left out; prints a warning if there are any. The end of the mask is padding."""
    left_out = np.flatnonzero(mask[: len(source)] == 0)
    if left_out.size and jax.process_index() == 0:
        warn(
            f"{left_out.size} of the {len(source)} held-out images cannot be decoded and are left out of the "
            f"evaluation; the first is {source.describe(int(left_out[0]))}"
        )
    return left_out.size


def metrics_of(
    prefix: str, batches: list[dict[str, np.ndarray]], summarize: Summarize | None = None
) -> dict[str, float]:
    """Means of the values of an objective's `evaluate`, and `eval/num_examples`; see `run_evaluation`.

    Args:
      prefix: prefix of the metrics.
      batches: values by name and `mask` of each batch.
      summarize: makes metrics of values that are no single numbers; None: these are left out.

    Raises:
      ConfigError: there was no example to evaluate.
    """
    # Padding and images that could not be decoded must not count, even if their loss is not finite.
    counted = np.concatenate([batch["mask"] for batch in batches] or [np.zeros(0)]) > 0
    check_any(counted)
    values = {
        name: np.concatenate([batch[name] for batch in batches])[counted]
        for name in batches[0]
        if name != "mask" and not _is_outcome(name)
    }
    is_finite = np.isfinite(values["loss"])
    means = {
        f"{prefix}/{name}": float(np.mean(value if name == "loss" else np.where(is_finite, value, 0), dtype=np.float64))
        for name, value in values.items()
        if value.ndim == 1
    }
    rows = {name: value for name, value in values.items() if value.ndim > 1}
    if rows and summarize is not None:
        means |= {f"{prefix}/{name}": value for name, value in summarize(rows).items()}
    return means | {"eval/num_examples": float(np.sum(counted))}


def check_any(counted: np.ndarray) -> None:
    """Raises `ConfigError` if no example counts."""
    if not np.any(counted):
        raise ConfigError(
            "no held-out image could be evaluated: there is none, or each is damaged and was left out; "
            "nfnet doctor --all-images, with --workdir or --recipe, names those that are"
        )
