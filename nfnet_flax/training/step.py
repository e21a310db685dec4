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

from nfnet_flax.models import convolution, example_keys
from nfnet_flax.models.params import BatchStats, GraphDef, Params, batch_stats_of, merge
from nfnet_flax.optim.optimizer import update_ema
from nfnet_flax.parallel.mesh import DATA_AXIS
from nfnet_flax.training.state import TrainState

Batch = dict[str, Any]
"""`image` (N, H, W, 3) uint8 or already normalised float; `label` (N,) int32; optionally `mix_label` (N,) int32 and
`label_weight` (N,) float32, the share of `label` in the target."""
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
    graphdef: GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    num_classes: int,
    label_smoothing: float,
    ema_decay: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `step(state, batch) -> (state, metrics)`; `state` is donated, metrics stay on the device.

    Args:
      graphdef: structure of the network, in training mode.
      optimizer: over `{name: array}` parameters.
      schedule: the optimizer's learning rate, for the metrics.
      mesh: with a data axis that divides the batch.
      seed: of dropout and stochastic depth.
      num_classes: of the head.
      label_smoothing: share of the target that is spread over all classes.
      ema_decay: of the moving average.
      mean: per channel, in grey levels, subtracted from uint8 images.
      std: per channel, in grey levels.

    Returns:
      The jitted step. A loss or gradient that is not finite leaves the state as it was, its step included.
    """
    platform = mesh.devices.flat[0].platform

    def local_gradient(
        params: Params, batch_stats: BatchStats, step: jax.Array, batch: Batch
    ) -> tuple[Params, BatchStats, Metrics]:
        num_rows = batch["label"].shape[0]
        rows = lax.axis_index(DATA_AXIS) * num_rows + jnp.arange(num_rows)
        keys = example_keys(jax.random.fold_in(jax.random.key(seed), step), rows)

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[jax.Array, BatchStats]]:
            model = merge(graphdef, params, batch_stats)
            with convolution.for_platform(platform):
                logits = model(normalise(batch["image"], mean, std), keys)
            targets = soft_targets(batch, num_classes, label_smoothing)
            return jnp.mean(cross_entropy(logits, targets)), (logits, batch_stats_of(model))

        (loss, (logits, moved)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        top1 = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        gradient, metrics = lax.pmean((gradient, {"train/loss": loss, "train/top1": top1}), DATA_AXIS)
        # Counts are whole numbers, and the same on all devices.
        moved = {n: lax.pmean(v, DATA_AXIS) if jnp.issubdtype(v.dtype, jnp.floating) else v for n, v in moved.items()}
        return gradient, moved, metrics

    sharded_gradient = jax.shard_map(
        local_gradient,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(), PartitionSpec(DATA_AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def update(state: TrainState, gradient: Params, batch_stats: BatchStats) -> TrainState:
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=update_ema(state.ema_params, params, state.step, ema_decay),
            ema_batch_stats=update_ema(state.ema_batch_stats, batch_stats, state.step, ema_decay),
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient, batch_stats, metrics = sharded_gradient(state.params, state.batch_stats, state.step, batch)
        metrics["train/grad_norm"] = optax.tree.norm(gradient)
        metrics["train/learning_rate"] = schedule(state.step)
        finite = jnp.isfinite(metrics["train/loss"]) & jnp.isfinite(metrics["train/grad_norm"])
        state = lax.cond(finite, update, lambda state, *_: state, state, gradient, batch_stats)
        clipped_fraction = optax.tree.get(state.opt_state, "clipped_fraction")
        if clipped_fraction is not None:
            metrics["agc/clipped_fraction"] = clipped_fraction
        return state, metrics

    return jax.jit(train_step, donate_argnums=0)
