"""Evaluation: every held-out example exactly once, for raw and EMA parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from nfnet_flax.models import NFNetConfig, convolution
from nfnet_flax.models.layers import DTYPES
from nfnet_flax.models.params import BatchStats, Params, cast, merge, prepare
from nfnet_flax.parallel.mesh import BATCH_AXES, count_turns, replicated, to_global
from nfnet_flax.parallel.reduce import Arrays, stack_of_turns, tied
from nfnet_flax.training.gradient import Batch, cross_entropy, normalise
from nfnet_flax.training.state import Structure, TrainState

Weights = tuple[Params, BatchStats]
"""What a network computes with."""
_MAX_BATCHES_IN_FLIGHT = 2
EvalStep = Callable[[Weights, Batch], Arrays]


def make_eval_step(structure: Structure, mesh: Mesh, *, mean: tuple[float, ...], std: tuple[float, ...]) -> EvalStep:
    """Builds `step(weights, batch) -> per example`: `loss`, `top1` and `top5` (N,) float32, whole on every device.

    Rows are computed in as many parts as the training batch has, so that the number of devices does not decide how
    anything is rounded.
    """
    config, execution = structure.config, structure.execution
    form = config.standardization if isinstance(config, NFNetConfig) else "published"
    platform = mesh.devices.flat[0].platform
    num_turns = count_turns(execution.num_microbatches, mesh)
    num_candidates = min(5, structure.num_classes)

    def part(prepared: Params, batch_stats: BatchStats, batch: Batch) -> Arrays:
        model = merge(structure.prepared, prepared, batch_stats)
        model.eval()
        with convolution.for_platform(platform):
            logits = model(normalise(batch["image"], mean, std))
        hits = lax.top_k(logits, num_candidates)[1] == batch["label"][:, None]
        return {
            "loss": cross_entropy(logits, jax.nn.one_hot(batch["label"], structure.num_classes)),
            "top1": hits[:, 0].astype(jnp.float32),
            "top5": jnp.any(hits, axis=1).astype(jnp.float32),
        }

    def local(prepared: Params, batch_stats: BatchStats, batch: Batch) -> Arrays:
        num_rows = batch["label"].shape[0] // num_turns
        parts = jax.tree.map(lambda rows: rows.reshape(num_turns, num_rows, *rows.shape[1:]), batch)

        def turn(index: jax.Array) -> Arrays:
            rows = jax.tree.map(lambda rows: rows[index], parts)
            own_weights, rows = tied((prepared, rows), index)
            return part(own_weights, batch_stats, rows)

        found = stack_of_turns(turn, num_turns, batch["mask"][0])
        return {name: lax.all_gather(jnp.ravel(value), BATCH_AXES, tiled=True) for name, value in found.items()}

    per_device = jax.shard_map(
        local,
        mesh=mesh,
        axis_names=set(BATCH_AXES),
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(BATCH_AXES)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def step(weights: Weights, batch: Batch) -> Arrays:
        params, batch_stats = weights
        prepared, _ = prepare(params, form)
        found = per_device(cast(prepared, DTYPES[config.compute_dtype]), batch_stats, batch)
        return found | {"mask": lax.with_sharding_constraint(batch["mask"], replicated(mesh))}

    return jax.jit(step)


def weights_to_evaluate(state: TrainState) -> dict[str, Weights]:
    """Raw and EMA weights of a state, under the prefixes of their metrics."""
    return {
        "eval": (state.params, state.batch_stats),
        "eval_ema": (state.ema_params, state.ema_batch_stats),
    }


def run_evaluation(
    eval_step: EvalStep,
    weights_of: dict[str, Weights],
    batches: Iterable[dict[str, Any]],
    mesh: Mesh,
    is_stopped: Callable[[], bool] | None = None,
) -> dict[str, float] | None:
    """Metrics of several sets of weights over the same batches.

    Args:
      eval_step: from `make_eval_step`.
      weights_of: prefix of the metrics (`eval`, `eval_ema`) -> parameters and running statistics.
      batches: this process's rows, with `mask`.
      mesh: of the step.
      is_stopped: asked before each batch; true ends the evaluation early. The same in all processes.

    Returns:
      `{prefix}/top1`, `/top5`, `/loss`, and `eval/num_examples`; None if it was stopped.
    """
    found: list[dict[str, Arrays]] = []
    for rows in batches:
        if is_stopped is not None and is_stopped():
            return None
        batch = to_global(rows, mesh)
        found.append({prefix: eval_step(weights, batch) for prefix, weights in weights_of.items()})
        if len(found) > _MAX_BATCHES_IN_FLIGHT:  # bounds the images that wait on the devices
            jax.block_until_ready(found[-1 - _MAX_BATCHES_IN_FLIGHT])
    metrics: dict[str, float] = {}
    batches_of: list[dict[str, dict[str, np.ndarray]]] = jax.device_get(found)
    for prefix in weights_of:
        names = ("loss", "top1", "top5", "mask")
        whole = {name: np.concatenate([batch[prefix][name] for batch in batches_of]) for name in names}
        # Padding must not count even if its loss is not finite.
        counted = whole["mask"] > 0
        for name in ("top1", "top5", "loss"):
            metrics[f"{prefix}/{name}"] = float(np.mean(whole[name][counted], dtype=np.float64))
        metrics["eval/num_examples"] = float(np.sum(counted))
    return metrics
