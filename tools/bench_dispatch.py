"""Times what a training step costs the host: the call of the jitted step, not the computation.

`python tools/bench_dispatch.py` takes NFNet-F7's blocks, and so its number of arrays, with narrow layers, so that the
device is soon done. The call returns before the computation does; what it took is what the host cannot spend on the
next batch. On CPUs the computation would begin on the same core meanwhile: it gets the other cores, the call the first.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp

from nfnet_flax.models import ExecutionConfig, NFNetConfig, model_config
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.training.step import make_train_step

_WARMUP_CALLS = 3


def main() -> None:
    """Prints the least and the median time of a call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f7", help="an NFNet of `nfnet models`")
    parser.add_argument("--calls", type=int, default=30, help="timed calls")
    options = parser.parse_args()
    host_core, *device_cores = sorted(os.sched_getaffinity(0))
    if device_cores:
        os.sched_setaffinity(0, device_cores)  # JAX's backend has not started; its threads keep what they start with
    config = model_config(options.model, drop_rate=0.0, stochdepth_rate=0.0)
    assert isinstance(config, NFNetConfig)
    narrow = dataclasses.replace(config, widths=(16, 16, 32, 32), group_width=8)
    structure = model_structure(narrow, 10, ExecutionConfig(num_microbatches=1))

    def schedule(step: Any) -> jax.Array:
        return jnp.asarray(0.01, jnp.float32) + 0 * step

    optimizer = make_optimizer(OptimConfig(), schedule, structure.members)
    mesh = make_mesh(jax.devices()[:1])
    state = create_state(structure, 0, optimizer, mesh)
    step = make_train_step(
        structure,
        optimizer,
        schedule,
        mesh,
        seed=0,
        label_smoothing=0.1,
        ema_decay=0.999,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    batch = {"image": jnp.zeros((1, 32, 32, 3), jnp.uint8), "label": jnp.zeros((1,), jnp.int32)}
    if device_cores:
        os.sched_setaffinity(0, [host_core])  # of this thread alone
    print(f"{options.model}: {len(state.params)} arrays of parameters, {len(jax.tree.leaves(state))} of the state")
    unchanged = jax.jit(lambda state, batch: (state, batch), donate_argnums=0)
    programs = {"the training step": step, "a program that returns the state as it is": unchanged}
    # Each by itself, then both in turn: the figures differ much.
    for together in (*([name] for name in programs), list(programs)):
        times: dict[str, list[float]] = {name: [] for name in together}
        for _ in range(_WARMUP_CALLS + options.calls):
            for name in together:
                jax.block_until_ready((state, batch))
                started = time.perf_counter()
                state, _ = programs[name](state, batch)
                times[name].append(1e3 * (time.perf_counter() - started))
        for name, calls in times.items():
            timed = calls[_WARMUP_CALLS:]
            print(
                f"{name}, {'by itself' if len(together) == 1 else 'in turn'}: a call takes the host at least "
                f"{min(timed):.2f} ms, {statistics.median(timed):.2f} ms in the median of {len(timed)}"
            )


if __name__ == "__main__":
    main()
