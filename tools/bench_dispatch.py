"""Times the call of the jitted training step on the host, without the computation.

`python tools/bench_dispatch.py` uses NFNet-F7's blocks, and so its number of arrays, but narrow layers, so that the
computation takes little time. The call returns before the computation ends; while it runs, the host cannot work on the
next batch. On CPUs the computation could start on the same core meanwhile; so the call gets the first core, and the
computation the others.

A program that only returns the arrays is called before every timed call. Both programs are timed directly after it, and
after a pause in which the host computes something else. The same is done for a walk over a chain of Python objects,
without JAX: it shows how much slower any code is on this machine if it was not used for that time.
"""

import argparse
import dataclasses
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp

from nfnet_flax.models import ExecutionConfig, NFNetConfig, model_config
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.training.step import make_train_step

_WARMUP_CALLS = 3
_PAUSE_S = 0.05
_CHAIN_LENGTH = 1000


class Link:
    """An element of a chain."""

    __slots__ = ("next",)
    next: "Link"


def chain(length: int) -> Link:
    """A ring of objects in random order."""
    links = [Link() for _ in range(length)]
    order = random.Random(0).sample(links, length)
    for link, following in zip(order, order[1:] + order[:1], strict=True):
        link.next = following
    return links[0]


def walk(link: Link) -> None:
    """Goes round the ring once."""
    for _ in range(_CHAIN_LENGTH):
        link = link.next


def pause(seconds: float) -> None:
    """Keeps the core busy with something that touches no memory."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def main() -> None:
    """Prints the smallest and the median time of a call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f7", help="name of an NFNet from `nfnet models`")
    parser.add_argument("--calls", type=int, default=30, help="number of timed calls")
    options = parser.parse_args()
    host_core, *device_cores = sorted(os.sched_getaffinity(0))
    if device_cores:
        os.sched_setaffinity(0, device_cores)  # before JAX's backend starts, as its threads keep these cores
    config = model_config(options.model, drop_rate=0.0, stochdepth_rate=0.0)
    assert isinstance(config, NFNetConfig)
    narrow = dataclasses.replace(config, widths=(16, 16, 32, 32), group_width=8)
    structure = model_structure(narrow, 10, ExecutionConfig(num_microbatches=1))

    def schedule(step: Any) -> jax.Array:
        return jnp.asarray(0.01, jnp.float32) + 0 * step

    optimizer = make_optimizer(OptimConfig(), schedule, structure.shapes)
    mesh = make_mesh(jax.devices()[:1])
    state = create_state(structure, 0, optimizer, mesh)
    step = make_train_step(structure, optimizer, SoftmaxCrossEntropy(), mesh, seed=0)
    batch = {"image": jnp.zeros((1, 32, 32, 3), jnp.uint8), "label": jnp.zeros((1,), jnp.int32)}
    if device_cores:
        os.sched_setaffinity(0, [host_core])  # only for this thread
    print(f"{options.model}: {len(state.params)} arrays of parameters, {len(jax.tree.leaves(state))} of the state")
    unchanged = jax.jit(lambda state, batch: (state, batch), donate_argnums=0)
    ring = chain(_CHAIN_LENGTH)
    held = [state]

    def call(program: Any) -> None:
        held[0], _ = program(held[0], batch)

    timed: dict[str, Callable[[], None]] = {
        "the training step": lambda: call(step),
        "a program that returns the state as it is": lambda: call(unchanged),
        f"a walk over {_CHAIN_LENGTH} Python objects": lambda: walk(ring),
    }
    for name, function in timed.items():
        for pause_s in (0.0, _PAUSE_S):
            times = []
            for _ in range(_WARMUP_CALLS + options.calls):
                jax.block_until_ready(held[0])
                call(unchanged)
                walk(ring)
                jax.block_until_ready(held[0])
                pause(pause_s)
                started = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - started))
            when = f"{1e3 * pause_s:.0f} ms later" if pause_s else "at once"
            least, median = min(times[_WARMUP_CALLS:]), statistics.median(times[_WARMUP_CALLS:])
            print(f"{name}, {when}: at least {least:.3f} ms, {median:.3f} ms in the median of {options.calls}")


if __name__ == "__main__":
    main()
