"""Shares of the state: which methods can update one, and what devices learn of whole kernels."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnet_flax.open_config import kinds_of
from nfnet_flax.optim.clipping import Clipping
from nfnet_flax.optim.methods import Method
from tests import runs

KERNELS = {"a.kernel": (3, 3, 8, 6), "head.kernel": (8, 5)}
WHOLE = {"a.gain": (6,), "head.bias": (5,)}


def arrays(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in (KERNELS | WHOLE).items()}


def share(values: dict[str, jax.Array], index: int) -> dict[str, jax.Array]:
    """One of two shares of the kernels, along their input channels, and all that is whole."""
    return {name: jnp.split(value, 2, axis=-2)[index] if name in KERNELS else value for name, value in values.items()}


def unit_norms(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        name: jnp.sqrt(jnp.sum(jnp.square(values[name]), axis=tuple(range(len(shape) - 1)), keepdims=True))
        for name, shape in KERNELS.items()
    }


def check_updates_of_shares(transformation: optax.GradientTransformation) -> None:
    """The update of a share is that share of the update, if the numbers of whole kernels are given."""
    params, update = arrays(0), optax.with_extra_args_support(transformation).update
    shares = [share(params, index) for index in range(2)]
    states = [transformation.init(values) for values in (params, *shares)]
    for step in range(1, 4):
        gradient = arrays(step)
        norms, own_norms = unit_norms(gradient), unit_norms(params)
        facts = {
            "unit_norms": {name: (norms[name], own_norms[name]) if name in norms else None for name in params},
            "global_norm": optax.tree.norm(gradient),
        }
        whole, states[0] = update(gradient, states[0], params, **facts)
        for index, own in enumerate(shares):
            found, states[1 + index] = update(share(gradient, index), states[1 + index], own, **facts)
            for name, value in share(whole, index).items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kind", [kind for kind in kinds_of(Method).values() if kind().is_divisible])
def test_a_divisible_method_updates_each_share_by_itself(kind: type[Method]) -> None:
    decay = optax.add_decayed_weights(0.1)
    check_updates_of_shares(kind().transformation(lambda step: 0.1, decay, list(KERNELS | WHOLE)))


@pytest.mark.parametrize("kind", [kind for kind in kinds_of(Clipping).values() if kind().is_divisible])
def test_divisible_clipping_clips_each_share_by_itself(kind: type[Clipping]) -> None:
    check_updates_of_shares(kind().transformation(list(KERNELS | WHOLE)))


SUMS = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from nfnet_flax.models.preparation import UNDIVIDED, prepare, unit_gradients
from nfnet_flax.parallel.mesh import make_mesh, partition_spec, sharded_axis
from nfnet_flax.training.shares import Shares

shapes = {"a.kernel": (3, 3, 32, 48), "b.kernel": (1, 1, 64, 16), "c.kernel": (3, 3, 3, 8), "head.kernel": (48, 10)}
rng = np.random.default_rng(0)
params = {name: (7.0 + rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
params |= {name.replace("kernel", "gain"): np.ones(shapes[name][-1], np.float32) for name in shapes if name[1] == "."}
dy = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in params.items()}
form = "published"

def found_on(num_devices, num_shares, num_parts):
    mesh = make_mesh(jax.devices()[:num_devices], num_shares=num_shares)
    axes = {name: sharded_axis(name, value.shape, mesh, num_parts) for name, value in params.items()}
    assert num_devices == 1 or [name for name in shapes if axes[name] is None] == ["c.kernel"]

    def local(params, dy, zero):
        division = Shares(axes=axes, num_devices=num_shares, num_parts=num_parts, platform="cpu", not_negative=zero)
        prepared, facts = prepare(params, form, division)
        units = unit_gradients(dy, params, facts, form, division)
        return prepared, units  # a step keeps what is made of these in a branch of its own, for the same rounding

    specs = {name: partition_spec(axis) for name, axis in axes.items()}
    step = jax.shard_map(local, mesh=mesh, in_specs=(specs, specs, P()), out_specs=(specs, P()), check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(step)(params, dy, np.int32(0)))

prepared, facts = prepare(params, form, UNDIVIDED)
units = unit_gradients(dy, params, facts, form)
plain = jax.tree.map(np.asarray, (prepared, units))
one = found_on(1, 1, 16)
for layout in ((1, 1, None), (2, 2, 16), (8, 2, 16), (8, 8, 16), (4, 2, 16), (8, 8, None), (8, 2, None)):
    got = found_on(*layout)
    for (path, a), (_, b), (_, c) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, one, plain)), strict=True):
        np.testing.assert_allclose(a, c, rtol=2e-5, atol=2e-5 * np.abs(c).max(), err_msg=f"{layout} {path}")
        assert layout[-1] is None or a.tobytes() == b.tobytes(), (layout, path)
"""

WHOLE_KERNELS = """
import jax
from nfnet_flax.config import ConfigError
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import LAMB, OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import model_structure
from nfnet_flax.training.step import make_train_step

config = OptimConfig(method=LAMB())
for is_divided in (False, True):
    structure = model_structure(NFNetConfig(widths=(8,), depths=(1,), group_width=4), 10, is_divided=is_divided)
    optimizer = make_optimizer(config, lambda step: 0.1, structure.shapes)
    assert all(axis is None for axis in structure.sharded_axes(make_mesh()).values()) != is_divided
    try:
        make_train_step(structure, optimizer, SoftmaxCrossEntropy(), make_mesh(), seed=0)
    except ConfigError as error:
        print(error)
"""


def test_a_method_that_needs_whole_kernels_is_not_given_shares() -> None:
    words = [sys.executable, "-c", WHOLE_KERNELS]
    done = subprocess.run(words, env=runs.with_devices(2), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "is_divided = True: the optimizer needs whole kernels: give model_structure(..., "
        "is_divided=optimizer.is_divisible)\n"
    )


def test_sums_over_shares_are_those_of_whole_kernels_and_have_the_same_bits() -> None:
    env = {**os.environ, **runs.OPTIMIZED, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SUMS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
