"""The compiled step on eight forced host devices against one, whole and in microbatches."""

import subprocess
import sys

import numpy as np
import pytest

from tests import runs

SCRIPT = """
import dataclasses, re, sys
import jax, numpy as np
from nfnet_flax.programs.hlo import collective_bytes, parse
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import Cosine, OptimConfig, RunLength, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.training.step import make_train_step

assert jax.device_count() == int(sys.argv[1])
config = NFNetConfig(widths=(16, 32), depths=(1, 1), group_width=4, drop_rate=0.2, stochdepth_rate=0.2)
execution = ExecutionConfig(num_microbatches=int(sys.argv[2]) if len(sys.argv) > 2 else None, reproducible=False)
structure = model_structure(config, 10, execution)
schedule = Cosine().learning_rate(0.05, RunLength(warmup_steps=2, num_steps=20, steps_per_epoch=1.0))
tx = make_optimizer(OptimConfig(ema_decay=0.9), schedule, structure.shapes)
mesh = make_mesh()
state = create_state(structure, 0, tx, mesh)
step = make_train_step(structure, tx, SoftmaxCrossEntropy(), mesh, seed=0)
rng = np.random.default_rng(0)
def batch():
    rows = {"image": rng.integers(0, 256, (64, 16, 16, 3)).astype(np.uint8), "label": rng.integers(0, 10, 64)}
    return to_global(rows, mesh)
first = batch()
compiled = step.lower(state, first).compile()
text = compiled.as_text()
program = parse(text)
print("payload", sum(collective_bytes(program).values()) / (4 * sum(leaf.size for leaf in state.params.values())))
print("gathers", len(re.findall(r"all-gather|all-to-all|collective-permute", text)))
print("divided", sum(axis is not None for axis in structure.sharded_axes(mesh).values()))
print("flops", compiled.cost_analysis()["flops"])
if len(sys.argv) == 2 and sys.argv[1] == "1":
    eighth = jax.tree.map(lambda rows: jax.ShapeDtypeStruct((8, *rows.shape[1:]), rows.dtype), first)
    print("eighth", step.lower(state, eighth).compile().cost_analysis()["flops"])
losses = []
for i in range(10):
    state, metrics = compiled(state, batch() if i else first)
    losses.append(float(metrics["train/loss"]))
print("losses", *losses)
params = dict(state.params)
params["head.bias"] = params["head.bias"].at[0].set(np.nan)
state = jax.device_put(dataclasses.replace(state, params=params), jax.tree.map(lambda x: x.sharding, state))
kept = jax.tree.map(np.array, state)
state, metrics = compiled(state, first)
assert not np.isfinite(metrics["train/loss"])
pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True)
assert all(a.tobytes() == np.array(b).tobytes() for a, b in pairs)
"""

BYTES = """
import jax
from nfnet_flax.models import ExecutionConfig, model_config
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import abstract_state, model_structure

structure = model_structure(model_config("nfnet_f0"), 1000, ExecutionConfig())
optimizer = make_optimizer(OptimConfig(), lambda step: 0.1, structure.shapes)
for num_devices, fsdp in ((1, 1), (4, 1), (4, 4)):
    state = abstract_state(structure, optimizer, make_mesh(jax.devices()[:num_devices], fsdp=fsdp))
    compiled = jax.jit(lambda state: state, donate_argnums=0).lower(state).compile()
    print(compiled.memory_analysis().argument_size_in_bytes)
"""


# Kernels of 12 input channels are divided by 2, those of 3 are not.
DIVIDED = """
import jax, jax.numpy as jnp, optax
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.gradient import make_gradient
from nfnet_flax.training.state import abstract_state, model_structure

config = NFNetConfig(widths=(12, 12), depths=(1, 2), group_width=3)
structure = model_structure(config, 10, ExecutionConfig(num_microbatches=2))
mesh = make_mesh(fsdp=2)
state = abstract_state(structure, optax.identity(), mesh)
shapes = {name: leaf.shape for name, leaf in structure.shapes.items()}
assert shapes == {name: leaf.shape for name, leaf in state.params.items()}
axes = structure.sharded_axes(mesh)
assert axes["stages.1.1.conv0.kernel"] == 2 and axes["stages.1.1.conv1.kernel"] is None and axes["head.kernel"] == 0
assert axes["head.bias"] is None
batch = {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((4,), jnp.int32)}
gradient = make_gradient(structure, SoftmaxCrossEntropy(), mesh, seed=0)
found, _, _ = jax.eval_shape(gradient, state.params, state.batch_stats, state.step, batch, {})
assert shapes == {name: leaf.shape for name, leaf in found.items()}
"""


def run(num_devices: int, *num_microbatches: int) -> dict[str, list[float]]:
    env = runs.with_devices(num_devices)
    words = [sys.executable, "-c", SCRIPT, str(num_devices), *map(str, num_microbatches)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: [float(word) for word in line.split()[1:]] for line in done.stdout.splitlines()}


@pytest.fixture(scope="module")
def one() -> dict[str, list[float]]:
    """The step of one device."""
    return run(1)


def test_microbatches_give_the_losses_of_the_whole_batch(one: dict[str, list[float]]) -> None:
    np.testing.assert_allclose(run(1, 8)["losses"], one["losses"], rtol=1e-5)


def test_eight_devices_give_the_losses_of_one_and_gather_weights_alone(one: dict[str, list[float]]) -> None:
    eight = run(8)
    for a, b in zip(one["losses"], eight["losses"], strict=True):
        assert abs(a - b) <= 1e-5 * abs(a)
    assert one["losses"][0] != one["losses"][-1]
    # One gather for each kernel that is divided: no activations.
    assert eight["gathers"] == eight["divided"]
    assert eight["divided"][0] > 10
    # What devices receive: the weights, an eighth of the gradient's sum, and little else. Gains are not summed: their
    # gradient follows from the kernels' sums.
    assert 1.0 + 1 / 8 < eight["payload"][0] < 1.25
    # Each device does what one device does with an eighth of the batch, but for most of the update.
    assert 0.95 * one["eighth"][0] < eight["flops"][0] < one["eighth"][0]
    assert one["eighth"][0] < one["flops"][0] / 4


def test_four_devices_hold_a_quarter_of_the_state_each() -> None:
    env = runs.with_devices(4)
    done = subprocess.run([sys.executable, "-c", BYTES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, divided, divided_by_fsdp = map(int, done.stdout.split())
    assert whole > 3 * 4 * 71e6  # parameters, momentum and EMA of F0
    assert divided == divided_by_fsdp <= 1.02 * whole / 4


def test_kernels_are_divided_along_their_input_channels() -> None:
    env = runs.with_devices(2)
    done = subprocess.run([sys.executable, "-c", DIVIDED], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
