"""Frozen parameters of a real network: they keep their bits, cost no state and no backward pass, and a run resumes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import SGD, OptimConfig, Optimizer, ParamGroup, make_optimizer
from nfnet_flax.optim.sam import ascend
from nfnet_flax.parallel.mesh import make_mesh, replicated, to_global
from nfnet_flax.training import checkpoint
from nfnet_flax.training.restoring import restore_newest
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.saving import make_notes
from nfnet_flax.training.state import abstract_state, create_state, model_structure
from nfnet_flax.training.step import make_train_step

RATE, MOMENTUM = 0.5, 0.9
MODEL = NFNetConfig(widths=(8, 8), depths=(1, 1), group_width=4, expansion=0.5, drop_rate=0.1)
STRUCTURE = model_structure(MODEL, 3, ExecutionConfig(num_microbatches=None, reproducible=False))
MESH = make_mesh(jax.devices()[:1])
# A gain without its kernel and a kernel without its gain, below the head.
TRAINED = ("head.kernel", "head.bias", "stages.1.0.conv0.gain", "stages.0.0.conv1.kernel")
GROUPS = (*(ParamGroup(name, 1.0) for name in TRAINED), ParamGroup("*", 0.0))


def optimizer_with(*groups: ParamGroup) -> Optimizer:
    config = OptimConfig(
        method=SGD(momentum=MOMENTUM),
        clipping=None,
        weight_decay=0.0,
        learning_rate_groups=groups or (ParamGroup("*", 1.0),),
        ema_decay=0.9,
    )
    return make_optimizer(config, lambda step: RATE, STRUCTURE.shapes)


def step_of(optimizer: Optimizer) -> jax.stages.Wrapped:
    return make_train_step(STRUCTURE, optimizer, SoftmaxCrossEntropy(), MESH, seed=0)


def batch(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    rows: dict[str, np.ndarray] = {
        "image": rng.integers(0, 255, (4, 16, 16, 3)).astype(np.uint8),
        "label": np.arange(4) % 3,
    }
    return to_global(rows, MESH)


def bits(state: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_what_is_frozen_keeps_its_bits_and_the_rest_moves_as_ever(tmp_path: Path) -> None:
    everything, part = optimizer_with(), optimizer_with(*GROUPS)
    assert part.frozen == STRUCTURE.shapes.keys() - set(TRAINED)
    before = create_state(STRUCTURE, 0, part, MESH)
    # At first the skip gains are 0, and the blocks do not count.
    params = {name: value + 0.5 * name.endswith("skip_gain") for name, value in before.params.items()}
    before = jax.device_get(dataclasses.replace(before, params=params, ema_params=params))
    step = step_of(part)
    start = dataclasses.replace(before, opt_state=everything.init(before.params))
    moved, metrics = step_of(everything)(jax.device_put(start, replicated(MESH)), batch(0))
    whole = jax.device_get(moved.params)
    state, part_metrics = step(jax.device_put(before, replicated(MESH)), batch(0))

    # The first step of Nesterov's momentum is 1 + MOMENTUM gradients.
    gradient = {name: (before.params[name] - whole[name]) / (RATE * (1 + MOMENTUM)) for name in TRAINED}
    for name in TRAINED:
        got = (before.params[name] - np.asarray(state.params[name])) / (RATE * (1 + MOMENTUM))
        np.testing.assert_allclose(got, gradient[name], rtol=1e-3, atol=1e-5 * np.max(np.abs(gradient[name])))
        assert np.any(gradient[name]), name
    assert part_metrics["train/loss"] == pytest.approx(float(metrics["train/loss"]), rel=1e-6)
    want = np.sqrt(sum(np.sum(np.square(value)) for value in gradient.values()))
    assert float(part_metrics["train/grad_norm"]) == pytest.approx(float(want), rel=1e-3)
    assert float(metrics["train/grad_norm"]) > 1.01 * want

    named = [path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if leaf.ndim]
    assert sorted(named) == sorted(TRAINED)

    with checkpoint.open_manager(tmp_path, "checkpoints", keep=1) as manager:
        checkpoint.save(manager, state, 1, make_notes(evaluated=True, metrics={}))
    for number in (1, 2):
        state, _ = step(state, batch(number))
    restored = restore_newest(RunFolder(tmp_path), abstract_state(STRUCTURE, part, MESH), is_owner=False)
    assert restored is not None
    again, _ = restored
    for number in (1, 2):
        again, _ = step(again, batch(number))
    assert bits(again) == bits(state)
    for name in part.frozen:
        kept = before.params[name].tobytes()
        assert np.asarray(state.params[name]).tobytes() == kept, name
        assert np.asarray(state.ema_params[name]).tobytes() == kept, name
    assert not np.array_equal(state.ema_params["head.bias"], state.params["head.bias"])


def test_nothing_is_passed_backwards_below_what_is_trained() -> None:
    def flops(optimizer: Optimizer) -> float:
        state = abstract_state(STRUCTURE, optimizer, MESH)
        cost = step_of(optimizer).lower(state, batch(0)).cost_analysis()
        assert cost is not None
        return float(cost["flops"])

    head, whole = (flops(optimizer_with(*groups)) for groups in ((ParamGroup("head.*", 1.0), ParamGroup("*", 0.0)), ()))
    assert head < 0.5 * whole


def test_sam_moves_what_is_trained() -> None:
    params = {"frozen": jnp.ones(2), "trained": jnp.ones(2)}
    moved = ascend(params, {"trained": jnp.asarray([3.0, 4.0])}, jnp.asarray(5.0), rho=0.5)
    assert moved["frozen"] is params["frozen"]
    np.testing.assert_allclose(moved["trained"], [1.3, 1.4], rtol=1e-6)
