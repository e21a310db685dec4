"""Times checkpoints of the size of a network: how long `save` blocks the loop, the checksums' part of it, and reading.

The arrays are random; no network runs.

Usage: python tools/bench_checkpoint.py [NAME]   (nfnet_f0 by default: 0.86 GB on disk for each of two checkpoints)
"""

import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from nfnet_flax.models import model_config
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training import checkpoint
from nfnet_flax.training.fingerprints import fingerprints
from nfnet_flax.training.restoring import read, restore_newest
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.state import TrainState, abstract_state, model_structure


def random_state(abstract: TrainState) -> TrainState:
    """A state of uniform random numbers, which cannot be compressed much."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_float = np.issubdtype(leaf.dtype, np.floating)
        values = rng.random(leaf.shape, np.float32) if is_float else np.ones(leaf.shape, leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(fill, abstract)


def main() -> None:
    """Prints one line for each cost."""
    name = sys.argv[1] if len(sys.argv) > 1 else "nfnet_f0"
    structure = model_structure(model_config(name), 1000)
    abstract = abstract_state(structure, make_optimizer(OptimConfig(), lambda step: 0.1, structure.shapes), make_mesh())
    state = jax.block_until_ready(random_state(abstract))
    leaves = jax.tree.leaves(state)
    print(f"{name}: {len(leaves)} arrays, {sum(leaf.nbytes for leaf in leaves) / 1e9:.2f} GB, {jax.devices()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        started = time.perf_counter()
        with checkpoint.open_manager(workdir, "checkpoints", keep=2) as manager:
            for step in (1, 2):
                started = time.perf_counter()
                fingerprints(state)
                print(f"fingerprints          {time.perf_counter() - started:6.2f} s")
                started = time.perf_counter()
                checkpoint.save(manager, state, step, {})
                print(f"save blocks for       {time.perf_counter() - started:6.2f} s, fingerprints included")
                manager.wait_until_finished()
                print(f"written               {time.perf_counter() - started:6.2f} s after the start of save")
        started = time.perf_counter()
        jax.block_until_ready(read(workdir / "checkpoints" / "2", abstract)[0])
        print(f"read                  {time.perf_counter() - started:6.2f} s")
        started = time.perf_counter()
        restore_newest(RunFolder(workdir), abstract, is_owner=False)
        print(f"read and verified     {time.perf_counter() - started:6.2f} s")


if __name__ == "__main__":
    main()
