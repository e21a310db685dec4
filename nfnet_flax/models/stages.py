"""What the backward pass of a stage keeps of the forward pass, and what it computes again (arXiv 1604.06174)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx

Rematerialization = Literal["none", "blocks", "full"]


def run_stage(
    blocks: Sequence[Any],
    x: jax.Array,
    keys: jax.Array | None,
    plans: Sequence[Any],
    rematerialization: Rematerialization,
) -> jax.Array:
    """The blocks of a stage, one after the other. None of the choices changes what is computed.

    Args:
      blocks: modules that map `(x, keys, plan)` to `(y, residual branch)`.
      x: (N, H, W, C) input.
      keys: (N,) PRNG keys, one per example.
      plans: a `BlockPlan` per block.
      rematerialization: keep everything; or the input of each block; or, of n blocks, the inputs of groups of about
        sqrt(n), and those within a group while the gradient passes it.

    Returns:
      (N, H', W', C') output. Running statistics of BatchNorm are updated in the modules.
    """

    def run_block(block: Any, x: jax.Array, plan: Any) -> jax.Array:
        y: jax.Array = block(x, keys, plan)[0]
        return y

    def run_blocks(blocks: Sequence[Any], x: jax.Array, plans: Sequence[Any]) -> jax.Array:
        run = run_block if rematerialization == "none" else nnx.remat(run_block, static_argnums=2)
        for block, plan in zip(blocks, plans, strict=True):
            x = run(block, x, plan)
        return x

    if rematerialization != "full":
        return run_blocks(blocks, x, plans)
    size = max(1, math.isqrt(len(blocks)))
    run_group = nnx.remat(run_blocks, static_argnums=2)
    for start in range(0, len(blocks), size):
        x = run_group(blocks[start : start + size], x, plans[start : start + size])
    return x
