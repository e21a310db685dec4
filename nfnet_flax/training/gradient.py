"""The gradient of the global batch: computed on each device under `shard_map`, part by part, then summed over devices.

`shard_map` is needed because XLA's partitioner would gather the activations of the whole global batch onto every device
for each grouped convolution (openxla issue 47945).
"""

import functools
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from nfnet_flax.config import require
from nfnet_flax.models import convolution, example_keys
from nfnet_flax.models.keys import key_of_step
from nfnet_flax.models.layers import DTYPES
from nfnet_flax.models.params import BatchStats, Params, batch_stats_of, cast, merge
from nfnet_flax.objectives import Arrays, Batch, Metric, Objective
from nfnet_flax.parallel.mesh import (
    BATCH_AXES,
    batch_shape,
    count_turns,
    num_batch_shards,
    partition_spec,
)
from nfnet_flax.parallel.reduce import (
    FastSum,
    OrderedSum,
    Part,
    Parts,
    Reduction,
    added,
    gathered,
    is_float,
)
from nfnet_flax.parallel.turns import bound_to_turn, cut_rows, sum_of_turns, used_in_turn
from nfnet_flax.training.state import Structure

Metrics = dict[str, jax.Array]
Gradient = Callable[[Params, BatchStats, jax.Array, Batch, Arrays], tuple[Params, BatchStats, Metrics]]
"""A function that returns the gradient of the mean loss over the global batch; see `make_gradient`."""
_LARGEST_NORMALISED = 32.0
"""Largest absolute value that is accepted in normalised images; those of zero mean and unit variance are far below."""
_TPU_ROWS = 8
"""Number of rows of a tile of a TPU's memory. With fewer images the compiler lays out a batch so that most of each tile
is empty, and four images take almost twice the time of eight."""


@jax.named_scope("normalise")
def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Converts uint8 images to zero mean and unit variance per channel, in float32.

    Float images are returned unchanged, as they should already be normalised. If they contain values that no normalised
    image has, such as grey levels up to 255, all values become NaN, and so does the loss, because a compiled step
    cannot raise an error.

    Raises:
      ConfigError: the images are neither uint8 nor float.
    """
    if images.dtype != jnp.uint8:
        is_float = bool(jnp.issubdtype(images.dtype, jnp.floating))
        require(
            is_float, "image", f"of type {images.dtype}", "give grey levels as uint8, or normalised images as float"
        )
        darkest, brightest = (
            max(abs(level - own_mean) / own_std for own_mean, own_std in zip(mean, std, strict=True))
            for level in (0.0, 255.0)
        )
        limit = max(_LARGEST_NORMALISED, darkest, brightest)
        return jnp.where(jnp.max(jnp.abs(images)) <= limit, images, jnp.nan)
    scale = jnp.asarray([1.0 / value for value in std], jnp.float32)
    return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)) * scale


def make_part(
    structure: Structure,
    objective: Objective,
    platform: str,
    num_parts: int,
    fixed: frozenset[str],
    *,
    is_normalised: bool,
) -> Callable[[BatchStats, Arrays, Params, jax.Array, Batch], Parts]:
    """Builds `part(batch_stats, arrays, weights, keys, batch)`: gradient, statistics and metrics of one part.

    Args:
      structure: structure of the network, and how it is computed.
      objective: computes the loss.
      platform: platform of the devices.
      num_parts: number of parts of the whole batch.
      fixed: names of weights for which no gradient is computed.
      is_normalised: whether the batch has images that are normalised already.
    """
    mean, std = structure.normalization.mean, structure.normalization.std
    is_full = platform != "tpu" or bool(structure.batch_stat_shapes)  # BatchNorm would count empty rows

    def loss_of(
        weights: Params, others: Params, batch_stats: BatchStats, arrays: Arrays, keys: jax.Array, batch: Batch
    ) -> tuple[jax.Array, tuple[BatchStats, Parts]]:
        model = merge(structure.prepared, weights | others, batch_stats)
        num_empty = 0 if is_full else max(0, _TPU_ROWS - len(keys))
        images = batch["image"]
        if not is_normalised:
            images = normalise(images, mean, std).astype(DTYPES[structure.config.compute_dtype])
            images = lax.optimization_barrier(images)  # so that not each use of the images computes them again
        with convolution.for_platform(platform), jax.named_scope("network"):
            logits = model(_padded(images, num_empty), _padded(keys, num_empty))[: len(images)]
        with convolution.for_platform(platform), jax.named_scope("loss"):
            losses, metrics = objective.train(logits, batch | {"image": images}, arrays)
        made_by, num_rows = f"{type(objective).__name__}.train", batch["label"].shape[0]
        require(losses.shape == (num_rows,), f"{made_by}: loss", f"of shape {losses.shape}", "must be (N,)")
        for name, metric in metrics.items():
            require(isinstance(metric, Metric), f"{made_by}: {name}", type(metric).__name__, "must be a Metric")
        # Divided by the number of parts, so that the results of the parts only have to be added.
        with jax.named_scope("loss"):
            share = jnp.mean(losses) / num_parts
        found = {"loss": Part(share)} | {name: _part_of(metric, num_parts) for name, metric in metrics.items()}
        return share, (batch_stats_of(model), {f"train/{name}": part for name, part in found.items()})

    def part(batch_stats: BatchStats, arrays: Arrays, weights: Params, keys: jax.Array, batch: Batch) -> Parts:
        others = {name: value for name, value in weights.items() if name in fixed}
        moving = {name: value for name, value in weights.items() if name not in fixed}
        gradient, (moved, metrics) = jax.grad(loss_of, has_aux=True)(moving, others, batch_stats, arrays, keys, batch)
        # Integers are BatchNorm's counts, which are the same in all parts.
        shares = {
            name: Part(value / num_parts) if is_float(value) else Part(value, "same") for name, value in moved.items()
        }
        found = {name: Part(value) for name, value in gradient.items()} | shares | metrics
        return jax.tree.map(lambda value: value.astype(jnp.float32) if is_float(value) else value, found)

    return part


def make_local_gradient(
    structure: Structure,
    objective: Objective,
    mesh: Mesh,
    *,
    seed: int,
    reduction: Reduction | None = None,
    fraction: float = 1.0,
    wanted: Container[str] | None = None,
) -> Gradient:
    """Builds `gradient(prepared, batch_stats, step, batch, arrays)` of the mean loss over the global batch.

    Args:
      structure: structure of the network, and how it is computed.
      objective: computes the loss.
      mesh: mesh over whose devices the rows of the batch are divided.
      seed: random seed of dropout and stochastic depth.
      reduction: adds the results of the devices; None: in a fixed order if `execution.reproducible` is on, otherwise in
        the fastest order.
      fraction: share of each microbatch that is used (its first rows).
      wanted: names of the parameters for which the gradient is computed. For the others nothing is computed, and the
        backward pass ends at the first layer that has a wanted parameter. None: all parameters.

    Returns:
      A function of prepared parameters, running statistics, the number of the step, the batch, and the objective's
      arrays; to be called on each device, under `shard_map`, with its share of the parameters and its rows of the
      batch. It returns the device's share of the gradient, the updated statistics and metrics.

    Raises:
      ConfigError: the parts of the batch cannot be divided equally over the mesh, or their number is not given although
        the result depends on it.
    """
    config, execution = structure.config, structure.execution
    reduction = reduction or (OrderedSum() if execution.reproducible else FastSum())
    platform = mesh.devices.flat[0].platform
    _require_parts(structure, fraction)
    num_turns = count_turns(execution.num_microbatches, mesh)
    num_parts = num_turns * num_batch_shards(mesh)
    # On TPUs the cast of a kernel is part of its product. Elsewhere it is a pass over memory, which is done only once.
    cast_in_turns = _dense_kernels(structure) if execution.reproducible and platform == "tpu" else ()

    fixed = frozenset(name for name in structure.shapes if wanted is not None and name not in wanted)
    mean, std = structure.normalization.mean, structure.normalization.std
    # What is fused with the choice of a part's rows is rounded alike for any number of parts on a device.
    is_alike = structure.num_parts is not None and platform != "tpu"
    # In a loop each turn normalises its images, as a TPU would otherwise change the layout of the bytes, which is slow.
    is_loop = num_turns > 1 or is_alike
    may_join = not execution.reproducible and not structure.batch_stat_shapes

    def local_gradient(
        prepared: Params, batch_stats: BatchStats, step: jax.Array, batch: Batch, arrays: Arrays
    ) -> tuple[Params, BatchStats, Metrics]:
        axes = structure.sharded_axes(mesh)
        num_rows = batch["label"].shape[0]
        rows = lax.axis_index(BATCH_AXES) * num_rows + jnp.arange(num_rows)
        keys = example_keys(key_of_step(seed, step), rows)
        if not is_loop:
            images = normalise(batch["image"], mean, std).astype(DTYPES[config.compute_dtype])
            batch = batch | {"image": images}
        with jax.named_scope("exchange"):
            weights = gathered(cast(prepared, DTYPES[config.compute_dtype]), axes)
        # These kernels are cast by the layers. Gathered ones are widened again, so that all layouts run the same loop.
        weights |= {name: _widened(weights[name], prepared[name], axes[name]) for name in cast_in_turns}
        parts = cut_rows((keys, batch), num_turns, is_alike=is_alike)
        parts, num_joined = _first_rows(parts, fraction, may_join=may_join)
        part = make_part(structure, objective, platform, num_parts // num_joined, fixed, is_normalised=not is_loop)
        one_part = functools.partial(part, batch_stats, arrays)
        order = step if execution.reproducible else None
        found = over_parts(one_part, weights, parts, num_turns // num_joined, order, cast_in_turns)
        axes |= dict.fromkeys(found.keys() - axes.keys())
        with jax.named_scope("exchange"):
            total = reduction.over_devices(found, axes, batch_shape(mesh))
        return (
            {name: total[name].astype(value.dtype) for name, value in prepared.items() if name not in fixed},
            {name: total[name].astype(value.dtype) for name, value in batch_stats.items()},
            {name: value for name, value in total.items() if name.startswith("train/")},
        )

    return local_gradient


def make_gradient(
    structure: Structure, objective: Objective, mesh: Mesh, *, seed: int, reduction: Reduction | None = None
) -> Gradient:
    """Builds a function of the arguments and results of `make_local_gradient`, for global arrays."""
    specs = {name: partition_spec(axis) for name, axis in structure.sharded_axes(mesh).items()}
    return jax.shard_map(
        make_local_gradient(structure, objective, mesh, seed=seed, reduction=reduction),
        mesh=mesh,
        axis_names=set(BATCH_AXES),
        in_specs=(specs, PartitionSpec(), PartitionSpec(), PartitionSpec(BATCH_AXES), PartitionSpec()),
        out_specs=(specs, PartitionSpec(), PartitionSpec()),
        check_vma=False,
    )


def _require_parts(structure: Structure, fraction: float) -> None:
    """Raises `ConfigError` if the number of parts is not given although the result depends on it."""
    by_part = []
    if structure.batch_stat_shapes:
        by_part.append("BatchNorm normalises each part of the batch by itself")
    if fraction < 1.0:
        by_part.append("optim.sam takes the first rows of each part of the batch")
    parts = structure.execution.num_microbatches
    remedy = f"give the number of parts, as {' and '.join(by_part)}"
    require(parts is not None or not by_part, "execution.num_microbatches", parts, remedy)


def _dense_kernels(structure: Structure) -> tuple[str, ...]:
    return tuple(name for name, whole in structure.shapes.items() if name.endswith(".kernel") and len(whole.shape) == 2)


def _padded(rows: jax.Array, num_empty: int) -> jax.Array:
    """Rows of a batch, and after them copies of the first one, whose results are not used: their gradient is zero."""
    return rows if num_empty == 0 else jnp.concatenate([rows, jnp.repeat(rows[:1], num_empty, axis=0)])


def _part_of(metric: Metric, num_parts: int) -> Part:
    match metric.combine:
        case "mean":
            return Part(jnp.mean(metric.value, dtype=jnp.float32) / num_parts)
        case "sum":
            return Part(jnp.sum(metric.value))
        case "same":
            return Part(metric.value, "same")


def _widened(weight: jax.Array, prepared: jax.Array, sharded_axis: int | None) -> jax.Array:
    return prepared if sharded_axis is None else weight.astype(prepared.dtype)


def _first_rows(
    parts: tuple[jax.Array, Batch], fraction: float, *, may_join: bool
) -> tuple[tuple[jax.Array, Batch], int]:
    """The first rows of each part; and how many parts were joined into one, so that a turn has no fewer rows than
    necessary: with a fifth of eight images an accelerator would be almost idle.

    Args:
      parts: keys and batch, (parts, rows, ...).
      fraction: share of the rows of a part.
      may_join: whether parts may be computed together: their sum is then rounded otherwise.
    """
    num_parts, num_rows = parts[0].shape[:2]
    num_used = max(1, round(fraction * num_rows))
    most = num_rows // num_used if may_join else 1
    num_joined = max(number for number in range(1, most + 1) if num_parts % number == 0)

    def used(rows: jax.Array) -> jax.Array:
        return rows[:, :num_used].reshape(num_parts // num_joined, num_joined * num_used, *rows.shape[2:])

    return jax.tree.map(used, parts), num_joined


def over_parts(
    one_part: Callable[[Params, jax.Array, Batch], Parts],
    weights: Params,
    parts: tuple[jax.Array, Batch],
    num_turns: int,
    step: jax.Array | None,
    cast_in_turns: tuple[str, ...],
) -> Parts:
    """The sum of the parts' results: in the order of the tree if a step is given, otherwise one part after the other.

    Args:
      one_part: function of the weights and of the keys and rows of one part.
      weights: weights, the same for all parts.
      parts: keys and batch, cut along a new first axis.
      num_turns: length of that axis.
      step: any number that is never negative, see `sum_of_turns`; None: the order does not matter.
      cast_in_turns: names of weights that `one_part` casts, if the sum is in the order of the tree.
    """

    def turn(index: jax.Array) -> Parts:
        keys, batch = jax.tree.map(lambda rows: rows[index], parts)
        held, keys, batch = bound_to_turn((weights, keys, batch), index)
        return one_part(held | {name: used_in_turn(held[name], index) for name in cast_in_turns}, keys, batch)

    if step is not None:
        return sum_of_turns(turn, num_turns, step)
    first = jax.tree.map(lambda rows: rows[0], parts)
    if num_turns == 1:
        return one_part(weights, *first)
    shapes = jax.eval_shape(one_part, weights, *first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: Parts, rows: Any) -> tuple[Parts, None]:
        found = one_part(weights, *rows)
        return added(total, found), None

    return lax.scan(add, zeros, parts)[0]
