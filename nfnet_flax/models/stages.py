"""How the blocks of a compact network are run: one after the other or as a compiled loop, kept or computed again.

None of it changes what is computed: a loop's body rounds as the unrolled block does up to the compiler's fusions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnet_flax.models.params import BatchStats, Params, batch_stats_of, merge, split, update


def run_stage(blocks: list[Any], x: jax.Array, keys: jax.Array | None, plans: tuple[Any, ...], execution: Any) -> Any:
    """One stage of a compact network.

    Args:
      blocks: all of them; or the first, and one module for all others, whose arrays have a leading axis over them.
      x: (N, H, W, C) input.
      keys: (N,) PRNG keys, one per example.
      plans: a `BlockPlan` per block.
      execution: an `ExecutionConfig`.

    Returns:
      (N, H', W', C') output. Running statistics of BatchNorm are updated in the modules.
    """
    parts = [split(block) for block in blocks]
    arrays = [(params, batch_stats) for _, params, batch_stats in parts]

    is_stacked, is_full = len(blocks) < len(plans), execution.rematerialization == "full"
    functions = [_block_function(graphdef, keys, execution.rematerialization != "none") for graphdef, *_ in parts]

    def run(x: jax.Array, arrays: list[tuple[Params, BatchStats]]) -> tuple[jax.Array, list[BatchStats]]:
        moved = []
        single = 1 if is_stacked else len(plans)
        for run_block, own, plan in zip(functions[:single], arrays, plans, strict=False):
            x, after = run_block(x, *own, plan)
            moved.append(after)
        if is_stacked:
            run_rest = (_scan_groups if is_full else _scan) if execution.scan_stages else _unroll
            x, after = run_rest(functions[1], x, *arrays[1], plans[1:])
            moved.append(after)
        return x, moved

    is_one_group = is_full and not (is_stacked and execution.scan_stages)
    x, moved = (jax.checkpoint(run) if is_one_group else run)(x, arrays)
    for block, batch_stats in zip(blocks, moved, strict=True):
        update(block, dict(batch_stats))
    return x


def _block_function(graphdef: Any, keys: jax.Array | None, is_rematerialized: bool) -> Any:
    def run_block(x: jax.Array, params: Params, batch_stats: BatchStats, plan: Any) -> tuple[jax.Array, BatchStats]:
        block = merge(graphdef, params, batch_stats)
        y, _ = block(x, keys, plan)
        return y, batch_stats_of(block)

    return jax.checkpoint(run_block) if is_rematerialized else run_block


def _stacked_plans(plans: tuple[Any, ...]) -> Any:
    return type(plans[0])(
        *(
            np.asarray(column, np.int32 if isinstance(column[0], int) else np.float32)
            for column in zip(*plans, strict=True)
        )
    )


def _scan(run_block: Any, x: jax.Array, params: Params, batch_stats: BatchStats, plans: tuple[Any, ...]) -> Any:
    return _scan_stacked(run_block, x, (params, batch_stats, _stacked_plans(plans)))


def _scan_stacked(run_block: Any, x: jax.Array, stacked: Any) -> Any:
    def body(x: jax.Array, block: Any) -> Any:
        return run_block(x, *block)

    return lax.scan(body, x, stacked)


def _scan_groups(run_block: Any, x: jax.Array, params: Params, batch_stats: BatchStats, plans: tuple[Any, ...]) -> Any:
    """As `_scan`, but of n blocks only the inputs of about 2 sqrt(n) are held at a time (arXiv 1604.06174, section 4).

    The inputs of groups of blocks are kept, and those of a group's blocks while the gradient passes it.
    """
    size = max(1, math.isqrt(len(plans)))
    num_groups = len(plans) // size
    num_grouped = num_groups * size
    stacked = (params, batch_stats, _stacked_plans(plans))

    @jax.checkpoint
    def run_group(x: jax.Array, group: Any) -> Any:
        return _scan_stacked(run_block, x, group)

    def cut(values: Any) -> Any:
        return values[:num_grouped].reshape(num_groups, size, *values.shape[1:])

    x, grouped = lax.scan(run_group, x, jax.tree.map(cut, stacked))
    moved = {name: value.reshape(num_grouped, *value.shape[2:]) for name, value in grouped.items()}
    if num_grouped < len(plans):
        x, rest = run_group(x, jax.tree.map(lambda values: values[num_grouped:], stacked))
        moved = {name: jnp.concatenate([value, rest[name]]) for name, value in moved.items()}
    return x, moved


def _unroll(run_block: Any, x: jax.Array, params: Params, batch_stats: BatchStats, plans: tuple[Any, ...]) -> Any:
    stacked = _stacked_plans(plans)
    # `split`, whose transpose is one concatenation; the transpose of n slices would be n padded sums.
    pieces = {name: lax.split(value, [1] * len(plans)) for name, value in (params | batch_stats).items()}
    moved = []
    for position in range(len(plans)):
        block_params = {name: pieces[name][position][0] for name in params}
        block_stats = {name: pieces[name][position][0] for name in batch_stats}
        x, after = run_block(x, block_params, block_stats, jax.tree.map(lambda v, i=position: v[i], stacked))
        moved.append(after)
    return x, {name: jnp.stack([after[name] for after in moved]) for name in batch_stats}
