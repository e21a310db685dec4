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
    name: str = "stage",
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
      name: of the stage, for the names of the operations.

    Returns:
      (N, H', W', C') output. Running statistics of BatchNorm are updated in the modules.
    """

    def run_block(block: Block, x: jax.Array, spec: "BlockSpec", scope: str) -> jax.Array:
        with jax.named_scope(scope):  # here, so that what is computed again for the backward pass has the name, too
            return block(x, keys, spec)[0]

    def run_blocks(
        blocks: Sequence[Block], x: jax.Array, specs: Sequence["BlockSpec"], scopes: Sequence[str]
    ) -> jax.Array:
        run = run_block if rematerialization == "none" else nnx.remat(run_block, static_argnums=(2, 3))
        for block, spec, scope in zip(blocks, specs, scopes, strict=True):
            x = run(block, x, spec, scope)
        return x

    scopes = tuple(f"{name}/block{position}" for position in range(len(blocks)))
    if rematerialization != "full":
        return run_blocks(blocks, x, specs, scopes)
    size = max(1, math.isqrt(len(blocks)))
    run_group = nnx.remat(run_blocks, static_argnums=(2, 3))
    for start in range(0, len(blocks), size):
        group = slice(start, start + size)
        x = run_group(blocks[group], x, specs[group], scopes[group])
    return x
