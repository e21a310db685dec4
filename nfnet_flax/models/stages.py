"""What the backward pass of a stage keeps of the forward pass, and what it computes again (arXiv 1604.06174)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import jax
from flax import nnx

if TYPE_CHECKING:
    from nfnet_flax.models.classifier import BlockSpec

Rematerialization = Literal["none", "blocks", "full"]


class Block(Protocol):
    """A residual block, which is an `nnx.Module`."""

    def __call__(self, x: jax.Array, keys: jax.Array | None, spec: "BlockSpec") -> tuple[jax.Array, jax.Array]:
        """The output, and the residual branch within it."""


def run_stage(
    blocks: Sequence[Block],
    x: jax.Array,
    keys: jax.Array | None,
    specs: Sequence["BlockSpec"],
    rematerialization: Rematerialization,
) -> jax.Array:
    """The blocks of a stage, one after the other. None of the choices changes what is computed.

    Args:
      blocks: of the stage.
      x: (N, H, W, C) input.
      keys: (N,) PRNG keys, one per example.
      specs: a `BlockSpec` per block.
      rematerialization: keep everything; or the input of each block; or, of n blocks, the inputs of groups of about
        sqrt(n), and those within a group while the gradient passes it.

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
