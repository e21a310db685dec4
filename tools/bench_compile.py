"""Times tracing and compilation of networks: the whole training step on this machine's device, without a cache.

`python tools/bench_compile.py [nfnet_f0 nfnet_f6 ...]` compiles each network twice, in turn, and prints the ratios to
the first one.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp

from nfnet_flax.models import model_config
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import abstract_state, model_structure
from nfnet_flax.training.step import make_train_step


def schedule(step: jax.Array) -> jax.Array:
    """A learning rate that does not change."""
    return jnp.asarray(0.1, jnp.float32) + 0 * step


def seconds_of(name: str, batch_size: int, size: int) -> tuple[float, float]:
    """Seconds for tracing and for compiling the step of a network."""
    structure = model_structure(model_config(name), 1000)
    optimizer = make_optimizer(OptimConfig(), schedule, structure.shapes)
    mesh = make_mesh(jax.devices()[:1])
    state = abstract_state(structure, optimizer, mesh)
    step = make_train_step(structure, optimizer, SoftmaxCrossEntropy(), mesh, seed=0)
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    started = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    lowered.compile()
    return traced - started, time.perf_counter() - traced


def main() -> None:
    """Prints a line for each compilation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["nfnet_f0", "nfnet_f6"], help="names from `nfnet models`")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    options = parser.parse_args()
    least: dict[str, float] = {}
    for name in [*options.models, *options.models]:
        trace_s, compile_s = seconds_of(name, options.batch, options.size)
        least[name] = min(least.get(name, float("inf")), trace_s + compile_s)
        print(
            f"{name}: traced in {trace_s:.1f} s, compiled in {compile_s:.1f} s; in all "
            f"{least[name] / least[options.models[0]]:.2f} times {options.models[0]} (least of its runs)",
            flush=True,
        )


if __name__ == "__main__":
    main()
