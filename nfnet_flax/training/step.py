"""One update: the gradient under `shard_map`, AGC, decay, momentum, EMA and metrics in a single donated `jit`.

The gradient is computed per shard on purpose: left to itself, XLA's partitioner gathers the activations of the whole
global batch onto every device for each grouped convolution (openxla issue 47945).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from nfnet_flax.models import NFNetConfig, convolution, example_keys
from nfnet_flax.models.layers import DTYPES
from nfnet_flax.models.params import BatchStats, Params, batch_stats_of, cast, global_norm, merge, prepare, pull_back
from nfnet_flax.optim.optimizer import update_ema
from nfnet_flax.parallel.mesh import DATA_AXIS
from nfnet_flax.training.state import Structure, TrainState

Batch = dict[str, Any]
"""`image` (N, H, W, 3) uint8 or already normalised float; `label` (N,) int32; optionally `mix_label` (N,) int32 and
`label_weight` (N,) float32, the share of `label` in the target; optionally `is_corrupt` (N,) float32, for a metric."""
Metrics = dict[str, jax.Array]


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 images to zero mean and unit variance per channel, in float32; float images pass unchanged."""
    if images.dtype != jnp.uint8:
        return images
    scale = jnp.asarray([1.0 / value for value in std], jnp.float32)
    return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) * scale


def soft_targets(batch: Batch, num_classes: int, label_smoothing: float) -> jax.Array:
    """(N, num_classes) float32 target distribution, mixed and smoothed."""
    targets = jax.nn.one_hot(batch["label"], num_classes)
    if "mix_label" in batch:
        weight = batch["label_weight"][:, None]
        targets = weight * targets + (1.0 - weight) * jax.nn.one_hot(batch["mix_label"], num_classes)
    return (1.0 - label_smoothing) * targets + label_smoothing / num_classes


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(N,) cross-entropy in float32."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def make_train_step(
    structure: Structure,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    label_smoothing: float,
    ema_decay: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> jax.stages.Wrapped:
    """Builds `step(state, batch) -> (state, metrics)`; `state` is donated, metrics stay on the device.

    Args:
      structure: of the network, and how it is computed.
      optimizer: over the parameters of the compact network.
      schedule: the optimizer's learning rate, for the metrics.
      mesh: with a data axis that divides the batch.
      seed: of dropout and stochastic depth.
      label_smoothing: share of the target that is spread over all classes.
      ema_decay: of the moving average.
      mean: per channel, in grey levels, subtracted from uint8 images.
      std: per channel, in grey levels.

    Returns:
      The jitted step. A loss or gradient that is not finite leaves the state as it was, its step included.
    """
    config = structure.config
    form = config.standardization if isinstance(config, NFNetConfig) else "published"
    sharded_gradient = _make_gradient(structure, mesh, seed=seed, label_smoothing=label_smoothing, mean=mean, std=std)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Kernels are standardized once, outside the loop over microbatches, and the gradient goes back through that
        # once, after the sum: in the update, a branch of its own, so that compilers do not fuse it with the backward
        # pass into passes over the parameters that repeat one another's work.
        prepared, statistics = prepare(state.params, form)
        gradient, batch_stats, metrics = sharded_gradient(prepared, state.batch_stats, state.step, batch)

        def update(state: TrainState, gradient: Params, batch_stats: BatchStats) -> tuple[TrainState, jax.Array]:
            gradient, unit_norms = pull_back(gradient, state.params, statistics, form)
            norm = global_norm(gradient, unit_norms)
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, unit_norms=unit_norms)
            params: Any = optax.apply_updates(state.params, updates)
            updated = TrainState(
                step=state.step + 1,
                params=params,
                batch_stats=batch_stats,
                opt_state=opt_state,
                ema_params=update_ema(state.ema_params, params, state.step, ema_decay),
                ema_batch_stats=update_ema(state.ema_batch_stats, batch_stats, state.step, ema_decay),
            )
            # The norm is finite if every gradient is; a choice per element costs no pass.
            return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(norm), new, old), updated, state), norm

        def keep(state: TrainState, gradient: Params, batch_stats: BatchStats) -> tuple[TrainState, jax.Array]:
            del batch_stats
            return state, optax.tree.norm(gradient)

        metrics["train/learning_rate"] = schedule(state.step)
        if "is_corrupt" in batch:
            metrics["data/num_corrupt"] = jnp.sum(batch["is_corrupt"])
        state, metrics["train/grad_norm"] = lax.cond(
            jnp.isfinite(metrics["train/loss"]), update, keep, state, gradient, batch_stats
        )
        clipped_fraction = optax.tree.get(state.opt_state, "clipped_fraction")
        if clipped_fraction is not None:
            metrics["agc/clipped_fraction"] = clipped_fraction
        return state, metrics

    return jax.jit(train_step, donate_argnums=0)


def _make_gradient(
    structure: Structure,
    mesh: Mesh,
    *,
    seed: int,
    label_smoothing: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable[[Params, BatchStats, jax.Array, Batch], tuple[Params, BatchStats, Metrics]]:
    """Builds `gradient(prepared, batch_stats, step, batch)` over the global batch: per shard, summed over devices."""
    config = structure.config
    platform = mesh.devices.flat[0].platform
    num_devices = mesh.shape[DATA_AXIS]
    parts = (structure.execution.num_microbatches or num_devices) // num_devices

    def loss_of(weights: Params, batch_stats: BatchStats, keys: jax.Array, batch: Batch) -> tuple[jax.Array, Any]:
        model = merge(structure.prepared, weights, batch_stats)
        with convolution.for_platform(platform):
            logits = model(normalise(batch["image"], mean, std), keys)
        targets = soft_targets(batch, structure.num_classes, label_smoothing)
        loss = jnp.mean(cross_entropy(logits, targets))
        top1 = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        # Of the mean over all parts: the gradients of the parts need only be added.
        share = loss / (parts * num_devices)
        return share, (batch_stats_of(model), {"train/loss": loss, "train/top1": top1})

    def local_gradient(
        prepared: Params, batch_stats: BatchStats, step: jax.Array, batch: Batch
    ) -> tuple[Params, BatchStats, Metrics]:
        num_rows = batch["label"].shape[0]
        rows = lax.axis_index(DATA_AXIS) * num_rows + jnp.arange(num_rows)
        keys = example_keys(jax.random.fold_in(jax.random.key(seed), step), rows)
        weights = cast(prepared, DTYPES[config.compute_dtype])

        def part_gradient(keys: jax.Array, batch: Batch) -> tuple[Params, tuple[BatchStats, Metrics]]:
            return jax.grad(loss_of, has_aux=True)(weights, batch_stats, keys, batch)

        gradient, (moved, metrics) = _over_parts(part_gradient, parts, keys, batch)
        gradient = {name: value.astype(prepared[name].dtype) for name, value in gradient.items()}
        return lax.psum(gradient, DATA_AXIS), _mean_statistics(moved), lax.pmean(metrics, DATA_AXIS)

    return jax.shard_map(
        local_gradient,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(), PartitionSpec(DATA_AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def _over_parts(
    part_gradient: Callable[[jax.Array, Batch], Any], parts: int, keys: jax.Array, batch: Batch
) -> tuple[Params, tuple[BatchStats, Metrics]]:
    """Gradients of equal parts of the rows, added in float32; statistics and metrics, averaged."""
    if parts == 1:
        return part_gradient(keys, batch)
    split_rows = jax.tree.map(lambda rows: rows.reshape(parts, rows.shape[0] // parts, *rows.shape[1:]), (keys, batch))
    shapes, _ = jax.eval_shape(part_gradient, *jax.tree.map(lambda rows: rows[0], split_rows))
    zeros = {name: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for name, leaf in shapes.items()}

    def add_part(total: Params, part: Any) -> tuple[Params, Any]:
        gradient, rest = part_gradient(*part)
        return {name: total[name] + gradient[name].astype(total[name].dtype) for name in total}, rest

    total, of_parts = lax.scan(add_part, zeros, split_rows)
    # Counts are whole numbers, and the same in all parts.
    rest = jax.tree.map(
        lambda values: jnp.mean(values, axis=0) if jnp.issubdtype(values.dtype, jnp.floating) else values[0], of_parts
    )
    return total, rest


def _mean_statistics(batch_stats: BatchStats) -> BatchStats:
    # Counts are whole numbers, and the same on all devices.
    return {
        name: lax.pmean(value, DATA_AXIS) if jnp.issubdtype(value.dtype, jnp.floating) else value
        for name, value in batch_stats.items()
    }
