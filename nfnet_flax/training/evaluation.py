"""Evaluation: every held-out example exactly once, for raw and EMA parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from nfnet_flax.models import convolution
from nfnet_flax.models.params import BatchStats, Params, merge
from nfnet_flax.parallel.mesh import DATA_AXIS, batch_sharding, to_global
from nfnet_flax.training.state import Structure, TrainState
from nfnet_flax.training.step import Batch, cross_entropy, normalise

Weights = tuple[Params, BatchStats]
"""What a network computes with."""
EvalStep = Callable[[Weights, Batch], dict[str, jax.Array]]


def make_eval_step(structure: Structure, mesh: Mesh, *, mean: tuple[float, ...], std: tuple[float, ...]) -> EvalStep:
    """Builds `step(weights, batch) -> sums` over the rows whose `mask` is 1: `loss`, `top1`, `top5` and `count`."""
    platform = mesh.devices.flat[0].platform
    num_classes = structure.num_classes
    num_candidates = min(5, num_classes)

    def local_sums(weights: Weights, batch: Batch) -> dict[str, jax.Array]:
        model = merge(structure.graphdef, *weights)
        model.eval()
        with convolution.for_platform(platform):
            logits = model(normalise(batch["image"], mean, std))
        hits = lax.top_k(logits, num_candidates)[1] == batch["label"][:, None]
        per_example = {
            "loss": cross_entropy(logits, jax.nn.one_hot(batch["label"], num_classes)),
            "top1": hits[:, 0].astype(jnp.float32),
            "top5": jnp.any(hits, axis=1).astype(jnp.float32),
            "count": jnp.ones_like(batch["mask"]),
        }
        # `where`, not a product: padding must not count even if its loss is not finite.
        sums = {name: jnp.sum(jnp.where(batch["mask"] > 0, value, 0.0)) for name, value in per_example.items()}
        return lax.psum(sums, DATA_AXIS)

    return jax.jit(
        jax.shard_map(
            local_sums,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(DATA_AXIS)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


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
    totals: dict[str, Any] = {}
    for rows in batches:
        if is_stopped is not None and is_stopped():
            return None
        batch = to_global(rows, batch_sharding(mesh))
        for prefix, weights in weights_of.items():
            sums = eval_step(weights, batch)
            totals[prefix] = jax.tree.map(jnp.add, totals[prefix], sums) if prefix in totals else sums
    metrics: dict[str, float] = {}
    for prefix, sums in jax.device_get(totals).items():
        count = float(sums["count"])
        metrics |= {f"{prefix}/{name}": float(sums[name]) / count for name in ("top1", "top5", "loss")}
        metrics["eval/num_examples"] = count
    return metrics
