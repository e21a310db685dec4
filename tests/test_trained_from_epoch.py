"""Parameters that are trained only from a later epoch on: frozen before, then as if their optimizer had just begun."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import from_json, to_json
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import (
    AGC,
    LAMB,
    SGD,
    Adafactor,
    AdamW,
    GlobalNorm,
    Lion,
    Method,
    Muon,
    OptimConfig,
    ParamGroup,
    RAdam,
    RMSProp,
    SAMConfig,
    groups_table,
    make_optimizer,
)
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.training import checkpoint
from nfnet_flax.training.restoring import restore_newest
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.saving import make_notes
from nfnet_flax.training.state import abstract_state, create_state, model_structure
from nfnet_flax.training.step import make_train_step

BODY, HEAD, LAST = "stages.0.0.conv0.kernel", "head.kernel", "stages.1.0.conv0.kernel"
GROUPS = (ParamGroup("head.*", 0.0), ParamGroup("*", 2.0))
RNG = np.random.default_rng(0)
START = {
    name: jnp.asarray(RNG.standard_normal((1, 1, 6, 8)[-2:] if name == HEAD else (1, 1, 6, 8)), jnp.float32)
    for name in (BODY, HEAD, LAST)
}
GRADIENTS = [
    {name: jnp.asarray(RNG.standard_normal(value.shape), jnp.float32) for name, value in START.items()}
    for _ in range(6)
]


def rate(step: jax.typing.ArrayLike) -> jax.Array:
    return 0.1 / (1.0 + jnp.asarray(step, jnp.float32))


@pytest.mark.parametrize("method", [SGD(), RMSProp(), AdamW(), RAdam(), Lion(), LAMB(), Adafactor(), Muon()])
def test_a_later_start_is_a_fresh_start(method: Method) -> None:
    config = OptimConfig(method=method, clipping=AGC(ratio=0.1), weight_decay=0.01, trained_from_epoch=GROUPS)
    config = dataclasses.replace(config, weight_decay_groups=(ParamGroup("*", 1.0),))
    tx = make_optimizer(config, rate, START, steps_per_epoch=1.5)
    assert tx.starts == {BODY: 3, LAST: 3}
    params, state = dict(START), tx.init(START)
    for step, gradient in enumerate(GRADIENTS):
        updates, new = tx.update(gradient, state, params, step=jnp.asarray(step))
        if step < 3:
            assert not np.any(updates[BODY])
            for before, after in zip(jax.tree.leaves(state[1][1]), jax.tree.leaves(new[1][1]), strict=True):
                assert np.array_equal(before, after)
        params, state = optax.apply_updates(params, updates), new
        if step < 3:
            assert np.asarray(params[BODY]).tobytes() == np.asarray(START[BODY]).tobytes()

    plain = dataclasses.replace(config, trained_from_epoch=())
    for names, start in (((HEAD,), 0), ((BODY, LAST), 3)):
        alone = make_optimizer(plain, lambda count, start=start: rate(count + start), START)
        part = {name: START[name] for name in names}
        held = alone.init(part)
        for gradient in GRADIENTS[start:]:
            updates, held = alone.update({name: gradient[name] for name in names}, held, part)
            part = optax.apply_updates(part, updates)
        for name in names:
            np.testing.assert_allclose(params[name], part[name], rtol=1e-6, atol=1e-7)
            assert not np.array_equal(params[name], START[name])


MODEL = NFNetConfig(widths=(8, 8), depths=(1, 1), group_width=4, expansion=0.5, drop_rate=0.1)
STRUCTURE = model_structure(MODEL, 3, ExecutionConfig(num_microbatches=2))
MESH = make_mesh(jax.devices()[:1])


def batch(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    rows: dict[str, np.ndarray] = {
        "image": rng.integers(0, 255, (4, 16, 16, 3)).astype(np.uint8),
        "label": np.arange(4) % 3,
    }
    return to_global(rows, MESH)


def test_a_network_keeps_its_bits_until_then_and_resumes(tmp_path: Path) -> None:
    config = OptimConfig(clipping=GlobalNorm(max_norm=0.5), ema_decay=0.9, trained_from_epoch=GROUPS)
    tx = make_optimizer(config, lambda step: jnp.asarray(0.1), STRUCTURE.shapes, steps_per_epoch=1.0)
    state = create_state(STRUCTURE, 0, tx, MESH)
    negative = {name: jnp.where(jnp.abs(value) < 0.01, -0.0, value) for name, value in state.params.items()}
    state = dataclasses.replace(state, params=negative, ema_params=jax.tree.map(jnp.copy, negative))
    before = jax.device_get(state.params)
    body = [name for name in before if not name.startswith("head.")]
    step = make_train_step(STRUCTURE, tx, SoftmaxCrossEntropy(), MESH, seed=0)
    for number in range(2):
        if number == 1:
            held = jax.tree.map(jnp.copy, state)  # the step is given the state itself
        state, metrics = step(state, batch(number))
        head = [np.asarray(state.params[name]) != before[name] for name in ("head.kernel", "head.bias")]
        assert all(np.any(moved) for moved in head)
        for name in body:
            assert np.asarray(state.params[name]).tobytes() == before[name].tobytes(), name
            assert np.asarray(state.ema_params[name]).tobytes() == before[name].tobytes(), name
        assert np.isfinite(metrics["train/grad_norm"])
    first = float(metrics["train/grad_norm"])
    state, metrics = step(state, batch(1))
    moved = [name for name in body if not np.array_equal(state.params[name], before[name])]
    assert len(moved) > len(body) / 2
    assert np.array_equal(state.ema_params[body[0]], before[body[0]]) == (body[0] not in moved)
    with checkpoint.open_manager(tmp_path, "checkpoints", keep=1) as manager:
        checkpoint.save(manager, held, 1, make_notes(evaluated=True, metrics={}))
    restored = restore_newest(RunFolder(tmp_path), abstract_state(STRUCTURE, tx, MESH), is_owner=False)
    assert restored is not None
    again, _ = restored
    for number in (1, 1):
        again, _ = step(again, batch(number))
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert float(metrics["train/grad_norm"]) != first


def test_what_cannot_be_meant_is_refused() -> None:
    config = OptimConfig(trained_from_epoch=GROUPS)
    assert from_json(OptimConfig, to_json(config)) == config
    assert "trained_from_epoch" not in to_json(OptimConfig())  # a run of an earlier version continues
    assert "x 1 from epoch 2" in groups_table(config, STRUCTURE.shapes)
    with pytest.raises(ConfigError, match=r"optim\.trained_from_epoch.*needs the length of an epoch"):
        make_optimizer(config, rate, STRUCTURE.shapes)
    with pytest.raises(ConfigError, match=r"optim\.trained_from_epoch: pattern 'tail\.\*' matches no parameter"):
        make_optimizer(
            OptimConfig(trained_from_epoch=(ParamGroup("tail.*", 1.0),)), rate, STRUCTURE.shapes, steps_per_epoch=1.0
        )
    for groups in ((ParamGroup("*", 1.0),), (ParamGroup("head.*", 0.0), ParamGroup("*", 1.0))):
        frozen = (ParamGroup("head.*", 0.0), ParamGroup("*", 1.0))
        late = OptimConfig(trained_from_epoch=groups, learning_rate_groups=frozen)
        with pytest.raises(ConfigError, match="leaves nothing to train at first"):
            make_optimizer(late, rate, STRUCTURE.shapes, steps_per_epoch=1.0)
    with pytest.raises(ConfigError, match="must not be negative"):
        OptimConfig(trained_from_epoch=(ParamGroup("*", -1.0),))
    with pytest.raises(ConfigError, match=r"optim\.sam.*needs all parameters from the start"):
        OptimConfig(trained_from_epoch=GROUPS, sam=SAMConfig())
