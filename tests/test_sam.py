"""Sharpness-aware minimization within a whole step: which images decide the direction uphill, and how they are
computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnet_flax.models import ExecutionConfig, NFNetConfig, build_model
from nfnet_flax.models.params import Params, merge, split
from nfnet_flax.objectives import Arrays, Batch, Metric, Objective, SoftmaxCrossEntropy
from nfnet_flax.optim import SGD, OptimConfig, SAMConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.training.gradient import normalise
from nfnet_flax.training.state import IMAGENET, TrainState, create_state, model_structure
from nfnet_flax.training.step import make_train_step

MODEL = NFNetConfig(widths=(8, 8), depths=(1, 1), group_width=4, stochdepth_rate=0.0, drop_rate=0.0)
NUM_CLASSES, NUM_PARTS, SIZE = 3, 4, 24
RATE, SAM = 0.5, SAMConfig(rho=0.3, fraction=0.25)
OBJECTIVE = SoftmaxCrossEntropy()
RNG = np.random.default_rng(0)
ROWS: dict[str, np.ndarray] = {
    "image": RNG.integers(0, 256, (16, SIZE, SIZE, 3)).astype(np.uint8),
    "label": RNG.integers(0, NUM_CLASSES, 16).astype(np.int32),
}
FIRST = np.arange(0, 16, 16 // NUM_PARTS)
"""A quarter of each part: its first row."""


def filled(params: Params) -> Params:
    """Parameters that are not symmetric, so that each image has another gradient."""
    rng = np.random.default_rng(1)
    return {
        name: jax.device_put((0.5 * rng.standard_normal(value.shape)).astype(np.float32), value.sharding)
        for name, value in params.items()
    }


def built(*, is_reproducible: bool, objective: Objective = OBJECTIVE) -> tuple[jax.stages.Wrapped, TrainState]:
    """A step with SAM whose update is the learning rate times the gradient, and the state before it."""
    execution = ExecutionConfig(num_microbatches=NUM_PARTS, reproducible=is_reproducible)
    structure = model_structure(MODEL, NUM_CLASSES, execution)
    config = OptimConfig(method=SGD(momentum=0.0), clipping=None, weight_decay=0.0, sam=SAM)
    optimizer = make_optimizer(config, lambda step: RATE, structure.shapes)
    mesh = make_mesh(jax.devices()[:1])
    state = create_state(structure, 0, optimizer, mesh)
    state = dataclasses.replace(state, params=filled(state.params))
    return make_train_step(structure, optimizer, objective, mesh, seed=0), state


@pytest.mark.parametrize("is_reproducible", [False, True])
def test_the_direction_uphill_is_that_of_the_first_rows_of_each_part(is_reproducible: bool) -> None:
    graphdef, _, statistics = split(build_model(MODEL, num_classes=NUM_CLASSES, rngs=nnx.Rngs(0)))
    step, state = built(is_reproducible=is_reproducible)
    before = {name: jnp.asarray(np.asarray(value)) for name, value in state.params.items()}

    @jax.jit
    def gradient(params: Params, rows: np.ndarray) -> Params:
        images = normalise(jnp.asarray(ROWS["image"])[rows], IMAGENET.mean, IMAGENET.std)

        def loss(params: Params) -> jax.Array:
            batch = {"image": images, "label": jnp.asarray(ROWS["label"])[rows]}
            return jnp.mean(OBJECTIVE.train(merge(graphdef, params, statistics)(images), batch, {})[0])

        return jax.grad(loss)(params)

    def stepped(first: np.ndarray) -> Params:
        uphill = gradient(before, first)
        norm = np.sqrt(sum(float(jnp.sum(jnp.square(value))) for value in uphill.values()))
        moved = {name: value + SAM.rho / norm * uphill[name] for name, value in before.items()}
        found = gradient(moved, np.arange(16))
        return {name: value - RATE * found[name] for name, value in before.items()}

    after = step(state, to_global(ROWS, make_mesh(jax.devices()[:1])), {})[0].params
    want, other = stepped(FIRST), stepped(FIRST + 1)
    for name, value in want.items():
        scale = np.abs(value - before[name]).max()
        np.testing.assert_allclose(after[name], value, atol=1e-3 * scale + 1e-6, rtol=0, err_msg=name)
    name = "head.kernel"
    assert np.abs(other[name] - want[name]).max() > 0.02 * np.abs(want[name] - before[name]).max()


@dataclasses.dataclass(frozen=True)
class Counting(SoftmaxCrossEntropy):
    """Notes for how many images at a time the loss is traced."""

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        TRACED.append(len(logits))
        return super().train(logits, batch, arrays)


TRACED: list[int] = []


@pytest.mark.parametrize(("is_reproducible", "num_rows"), [(False, {4}), (True, {4, 1})])
def test_the_fast_mode_computes_the_first_rows_of_several_parts_together(
    is_reproducible: bool, num_rows: set[int]
) -> None:
    step, state = built(is_reproducible=is_reproducible, objective=Counting())
    TRACED.clear()
    step.lower(state, to_global(ROWS, make_mesh(jax.devices()[:1])), {})
    assert set(TRACED) == num_rows  # those of a part, and those that decide the direction uphill
