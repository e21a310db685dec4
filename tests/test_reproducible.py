"""The same bits on any number of devices: the sums, and the whole step, on forced host devices."""

import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_flax.parallel.reduce import Part, Parts
from nfnet_flax.parallel.turns import sum_of_turns
from nfnet_flax.training.gradient import over_parts
from tests import runs

SUMS = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from nfnet_flax.parallel.mesh import BATCH_AXES, make_mesh, partition_spec, sharded_axis
from nfnet_flax.parallel.reduce import Part, sum_over_devices, tree_sum
from nfnet_flax.parallel.turns import sum_of_turns

rng = np.random.default_rng(0)
shapes = {"big.kernel": (3, 3, 40, 256), "odd.kernel": (7, 5), "vector": (13,), "scalar": (), "long": (70001,)}
# Of very different sizes, so that the order of a sum shows.
parts = {
    name: (rng.standard_normal((8, *shape)) * 10.0 ** rng.integers(-4, 4, (8, *shape))).astype(np.float32)
    for name, shape in shapes.items()
}

def add(a, b):
    return a + b

def by_hand(x):
    return add(add(add(x[0], x[1]), add(x[2], x[3])), add(add(x[4], x[5]), add(x[6], x[7])))

want = {name: by_hand(value) for name, value in parts.items()}
assert any(not np.array_equal(want[name], np.sum(value[::-1], axis=0)) for name, value in parts.items())
for num_devices, num_shares in ((1, 1), (2, 2), (2, 1), (4, 4), (8, 1), (8, 2), (8, 8)):
    mesh = make_mesh(jax.devices()[:num_devices], num_shares=num_shares)
    axes = {name: sharded_axis(name, shape, mesh, 8) for name, shape in shapes.items()}
    specs = {name: partition_spec(axis) for name, axis in axes.items()}
    assert (axes["big.kernel"] == 2) == (num_shares > 1) and axes["vector"] is None and axes["odd.kernel"] is None

    def local(parts, step):
        turns = 8 // num_devices
        total = sum_of_turns(lambda index: {name: Part(value[index]) for name, value in parts.items()}, turns, step)
        return sum_over_devices(total, axes, mesh.shape, reproducible=True)

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(BATCH_AXES), P()), out_specs=specs, check_vma=False))
    got = run(parts, jnp.zeros((), jnp.int32))
    for name in shapes:
        assert np.asarray(got[name]).tobytes() == want[name].tobytes(), (num_devices, num_shares, name)

# More devices than add at once, whole and as shares.
many = (rng.standard_normal((32, 640)) * 10.0 ** rng.integers(-4, 4, (32, 640))).astype(np.float32)
for num_shares, axis in ((1, None), (16, None), (2, 0), (16, 0)):
    mesh = make_mesh(jax.devices(), num_shares=num_shares)
    assert mesh.size == 32
    for reproducible in (True, False):
        run = jax.shard_map(
            lambda rows: sum_over_devices({"a": Part(rows[0])}, {"a": axis}, mesh.shape, reproducible=reproducible),
            mesh=mesh, in_specs=P(BATCH_AXES), out_specs=partition_spec(axis), check_vma=False,
        )
        got, want_many = np.asarray(jax.jit(run)(many)["a"]), tree_sum(list(many))
        assert got.tobytes() == want_many.tobytes() if reproducible else np.allclose(got, want_many, rtol=1e-3)
print("equal")
"""

STEP = """
import jax, numpy as np
from nfnet_flax.programs.hlo import collective_bytes, parse
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import Cosine, OptimConfig, RunLength, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.training.step import make_train_step

# Kernels of so few channels that a share fills no vector register: there, sums of two products were rounded otherwise.
config = NFNetConfig(widths=(8,), depths=(1,), group_width=4, drop_rate=0.2)

def run(num_devices, num_shares, measures=True):
    structure = model_structure(config, 10, ExecutionConfig(num_microbatches=4))
    schedule = Cosine().learning_rate(0.05, RunLength(warmup_steps=2, num_steps=20, steps_per_epoch=1.0))
    optimizer = make_optimizer(OptimConfig(ema_decay=0.9), schedule, structure.shapes)
    mesh = make_mesh(jax.devices()[:num_devices], num_shares=num_shares)
    state = create_state(structure, 0, optimizer, mesh)
    step = make_train_step(structure, optimizer, SoftmaxCrossEntropy(), mesh, seed=0)
    rng = np.random.default_rng(0)
    losses = []
    for i in range(4):
        rows = {"image": rng.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8), "label": rng.integers(0, 10, 16)}
        batch = to_global(rows, mesh)
        flag = (np.bool_(i % 2),) if measures else ()
        if i == 0:
            compiled = step.lower(state, batch, {}, *flag).compile()
            moved = sum(collective_bytes(parse(compiled.as_text())).values())
            share = moved / (4 * sum(leaf.size for leaf in state.params.values()))
        state, metrics = compiled(state, batch, {}, *flag)
        losses.append({name: np.asarray(value).tobytes() for name, value in metrics.items()})
    return share, losses, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

_, want_losses, want = run(1, 1)
share, losses, got = run(4, 4)
assert losses == want_losses
assert got == want
# What is measured of an update changes no bit of it.
assert any(want_losses[1]["agc/unit_ratios"]) and not any(want_losses[2]["agc/unit_ratios"])
_, losses, got = run(1, 1, measures=False)
measured = {"agc/unit_ratios", "train/param_norm", "train/update_norm"}
assert losses == [{name: row[name] for name in row if name not in measured} for row in want_losses]
assert got == want
# Gathered once, scattered once, and as the kernels are small, some for sums over them.
assert share < 2.2, share
print("equal")
"""


@pytest.mark.parametrize(("script", "num_devices"), [(SUMS, 32), (STEP, 8)], ids=["sums", "step"])
def test_the_same_bits_on_any_number_of_devices(script: str, num_devices: int) -> None:
    # Optimized as users' runs are: bits are the matter here.
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", "JAX_PLATFORMS": "cpu"}
    env = {**os.environ, **runs.OPTIMIZED, **flags}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


@pytest.mark.parametrize("num_turns", [1, 2, 4, 8, 16, 32])
def test_turns_are_added_in_the_tree_whatever_their_number(num_turns: int) -> None:
    rng = np.random.default_rng(num_turns)
    shapes: dict[str, tuple[int, ...]] = {"kernel": (3, 3, 5, 16), "vector": (7,), "scalar": ()}
    rows = {
        name: (rng.standard_normal((num_turns, *shape)) * 10.0 ** rng.integers(-4, 4, (num_turns, *shape))).astype("f")
        for name, shape in shapes.items()
    }
    counts = np.full(num_turns, 3)

    def turn(index: jax.Array) -> Parts:
        found = {name: Part(value[index]) for name, value in jax.tree.map(jnp.asarray, rows).items()}
        return found | {"sum": Part(jnp.asarray(counts)[index]), "same": Part(jnp.asarray(counts)[index], "same")}

    def tree(values: np.ndarray) -> np.ndarray:
        return values[0] if len(values) == 1 else tree(values[::2] + values[1::2])

    total = jax.jit(lambda step: sum_of_turns(turn, num_turns, step))(0)
    for name, value in rows.items():
        assert np.asarray(total[name].value).tobytes() == tree(value).tobytes(), name
    assert (int(total["sum"].value), int(total["same"].value)) == (3 * num_turns, 3)


@pytest.mark.parametrize("num_turns", [1, 4])
def test_kernels_that_are_cast_within_a_turn_give_the_bits_of_those_cast_before(num_turns: int) -> None:
    rng = np.random.default_rng(0)
    kernels = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"a": (24, 40), "b": (40, 8)}.items()
    }
    batch = {"image": jnp.asarray(rng.standard_normal((num_turns, 16, 24)), jnp.float32)}
    keys = jnp.zeros((num_turns, 16), jnp.uint32)

    def loss(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        hidden = jnp.tanh(images.astype(jnp.bfloat16) @ weights["a"].astype(jnp.bfloat16))
        return jnp.sum((hidden @ weights["b"].astype(jnp.bfloat16)).astype(jnp.float32) ** 2)

    def one_part(weights: dict[str, jax.Array], _: jax.Array, batch: dict[str, jax.Array]) -> Parts:
        gradient = jax.grad(loss)(weights, batch["image"])
        return {name: Part(value.astype(jnp.float32)) for name, value in gradient.items()}

    def total(weights: dict[str, Any], cast_in_turns: tuple[str, ...]) -> dict[str, np.ndarray]:
        run = functools.partial(over_parts, one_part, num_turns=num_turns, cast_in_turns=cast_in_turns)
        found = jax.jit(lambda weights, step: run(weights, (keys, batch), step=step))(weights, 0)
        return {name: np.asarray(part.value) for name, part in found.items()}

    before = total({name: jnp.asarray(value, jnp.bfloat16) for name, value in kernels.items()}, ())
    within = total(kernels, ("a", "b"))
    for name, value in before.items():
        assert np.abs(value).max() > 0
        assert value.tobytes() == within[name].tobytes()
