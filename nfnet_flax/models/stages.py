"""Runs the blocks of a stage, and decides which activations are stored or computed again (arXiv 1604.06174)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import jax
from flax import nnx

if TYPE_CHECKING:
    from nfnet_flax.models.classifier import BlockSpec

Rematerialization = Literal["none", "blocks", "full"]


class Block(Protocol):
    """A residual block; it must be an `nnx.Module`."""

    def __call__(self, x: jax.Array, keys: jax.Array | None, spec: "BlockSpec") -> tuple[jax.Array, jax.Array]:
        """The block's output, and its residual branch alone."""


def run_stage(
    blocks: Sequence[Block],
    x: jax.Array,
    keys: jax.Array | None,
    specs: Sequence["BlockSpec"],
    rematerialization: Rematerialization,
) -> jax.Array:
    """Runs the blocks of a stage, one after the other. The result does not depend on `rematerialization`.

    Args:
      blocks: blocks of the stage.
      x: (N, H, W, C) input.
      keys: (N,) PRNG keys, one per example.
      specs: a `BlockSpec` per block.
      rematerialization: what is stored for the backward pass. "none": everything; "blocks": the input of each block;
        "full": the inputs of groups of about sqrt(n) of the n blocks, and the inputs of a group's blocks while the
        gradient of that group is computed.

    Returns:
      (N, H', W', C') output. Running statistics of BatchNorm are updated in the modules.
    """

    def run_block(block: Block, x: jax.Array, spec: "BlockSpec") -> jax.Array:
        return block(x, keys, spec)[0]

    def run_blocks(blocks: Sequence[Block], x: jax.Array, specs: Sequence["BlockSpec"]) -> jax.Array:
        run = run_block if rematerialization == "none" else nnx.remat(run_block, static_argnums=2)
        for block, spec in zip(blocks, specs, strict=True):
            x = run(block, x, spec)
        return x

    if rematerialization != "full":
        return run_blocks(blocks, x, specs)
    size = max(1, math.isqrt(len(blocks)))
    run_group = nnx.remat(run_blocks, static_argnums=2)
    for start in range(0, len(blocks), size):
        x = run_group(blocks[start : start + size], x, specs[start : start + size])
    return x
