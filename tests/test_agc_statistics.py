"""What is shown of adaptive gradient clipping, against an independent computation from the same gradients."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.optim import adaptive_grad_clip, agc_statistics
from nfnet_flax.optim.agc import num_units, unitwise_norm
from nfnet_flax.telemetry import layers
from nfnet_flax.telemetry.layers import ClippingWatch, LayerLog, is_due
from tests import runs

STEP = """
import jax, numpy as np
from nfnet_flax.models import ExecutionConfig, model_config
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import AGC, SGD, OptimConfig, make_optimizer
from nfnet_flax.optim.agc import num_units
from nfnet_flax.optim.agc_statistics import split_ratios, statistics_of
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.training.step import UNIT_RATIOS, make_train_step

LEARNING_RATE, RATIO, EPS = 1e4, 0.02, 1e-3
config = model_config("nfnet_f0", widths=(8, 16), depths=(1, 2), group_width=4)
structure = model_structure(config, 10, ExecutionConfig(num_microbatches=4), is_divided=True)
rng = np.random.default_rng(0)
# Units of very different sizes, some of them at zero, as skip gains are at the start.
values = {
    name: (rng.standard_normal(leaf.shape) * np.exp(2 * rng.standard_normal(leaf.shape[-1:] or ()))).astype(np.float32)
    for name, leaf in structure.shapes.items()
}
values |= {name: np.zeros_like(value) for name, value in values.items() if name.endswith("skip_gain")}
rows = {"image": rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8), "label": rng.integers(0, 10, 8)}

def stepped(clipping, mesh):
    optim = OptimConfig(method=SGD(momentum=0.0), clipping=clipping, weight_decay=0.0, ema_decay=0.0)
    optimizer = make_optimizer(optim, lambda step: LEARNING_RATE, structure.shapes)
    state = create_state(structure, 0, optimizer, mesh)
    placed = {name: jax.device_put(value, state.params[name].sharding) for name, value in values.items()}
    import dataclasses
    state = dataclasses.replace(state, params=placed)
    step = make_train_step(structure, optimizer, SoftmaxCrossEntropy(), mesh, seed=0)
    state, metrics = step(state, to_global(rows, mesh), {}, np.bool_(True))
    return jax.device_get(state.params), jax.device_get(metrics)

after, plain = stepped(None, make_mesh(jax.devices()[:1]))
assert UNIT_RATIOS not in plain
gradient = {name: (values[name].astype(np.float64) - after[name]) / LEARNING_RATE for name in values}
want = {}
for name, value in gradient.items():
    if name == "head.kernel":
        continue
    axes = tuple(range(value.ndim - 1)) if value.ndim > 1 else None
    norm, own = (np.sqrt(np.sum(np.square(each, dtype=np.float64), axis=axes)) for each in (value, values[name]))
    want[name] = np.ravel(norm / np.maximum(own, EPS))
for mesh in (make_mesh(jax.devices()[:1]), make_mesh(jax.devices(), num_shares=4)):
    after, metrics = stepped(AGC(ratio=RATIO, eps=EPS), mesh)
    sizes = {name: num_units(values[name].shape) for name in want}
    got = split_ratios(metrics[UNIT_RATIOS], sizes)
    for name, ratios in want.items():
        np.testing.assert_allclose(got[name], ratios, rtol=2e-3, atol=1e-4 * max(ratios.max(), 1e-6), err_msg=name)
    found = statistics_of(got, RATIO)
    every = np.concatenate(list(want.values()))
    near = np.mean(np.abs(every / RATIO - 1) < 3e-3)  # units for which rounding decides
    assert 0.05 < found.total.clipped_fraction < 0.95
    assert abs(found.total.clipped_fraction - np.mean(every > RATIO)) <= near
    assert abs(found.total.clipped_fraction - metrics["agc/clipped_fraction"]) <= near
    np.testing.assert_allclose(found.total.median_ratio, np.median(every), rtol=2e-3)
    np.testing.assert_allclose(found.total.largest_ratio, every.max(), rtol=2e-3)
    for name, ratios in want.items():
        np.testing.assert_allclose(found.layers[name].largest_ratio, ratios.max(), rtol=2e-3, err_msg=name)
    moved = {name: after[name].astype(np.float64) - values[name] for name in values}
    update_norm = np.sqrt(sum(np.sum(np.square(value)) for value in moved.values()))
    np.testing.assert_allclose(metrics["train/update_norm"], update_norm, rtol=1e-4)
    param_norm = np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in values.values()))
    np.testing.assert_allclose(metrics["train/param_norm"], param_norm, rtol=1e-5)
print("equal")
"""


def test_ratios_and_norms_of_a_step_equal_those_of_its_gradient_on_1_and_4_devices() -> None:
    words = [sys.executable, "-c", STEP]
    done = subprocess.run(words, env=runs.with_devices(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


SHAPES = {"conv": {"kernel": (3, 3, 4, 6), "bias": (6,)}, "depthwise": (3, 4, 5), "head": (6, 5), "gain": ()}


def test_any_optax_optimizer_can_show_what_is_clipped() -> None:
    rng = np.random.default_rng(0)

    def filled(scale: float) -> dict[str, dict[str, jax.Array] | jax.Array]:
        return jax.tree.map(
            lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32),
            SHAPES,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    params, gradient = filled(1.0), filled(0.02)
    mask = jax.tree.map(lambda leaf: leaf.shape != (6, 5), params)
    tx = optax.chain(adaptive_grad_clip(0.02, mask=mask, keeps_ratios=True), optax.adam(1e-3))
    before = tx.init(params)
    assert agc_statistics(before).total.largest_ratio == 0
    updates, state = jax.jit(tx.update)(gradient, before, params)
    assert str(jax.tree.structure(before)) == str(jax.tree.structure(state))
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, state)
    plain = optax.chain(adaptive_grad_clip(0.02, mask=mask), optax.adam(1e-3))
    want_updates, _ = jax.jit(plain.update)(gradient, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, want_updates)

    found = agc_statistics(state)
    assert list(found.layers) == ["conv.bias", "conv.kernel", "depthwise", "gain"]
    every = []
    for (path, value), own in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(params), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name == "head":
            continue
        ratios = np.ravel(unitwise_norm(value) / np.maximum(unitwise_norm(own), 1e-3))
        assert len(ratios) == num_units(value.shape)
        units = found.layers[name]
        assert units.clipped_fraction == np.mean(ratios > 0.02)
        np.testing.assert_allclose([units.median_ratio, units.largest_ratio], [np.median(ratios), max(ratios)], 1e-6)
        every.append(ratios)
    assert found.total.clipped_fraction == np.mean(np.concatenate(every) > 0.02) > 0
    np.testing.assert_allclose(found.total.median_ratio, np.median(np.concatenate(every)), rtol=1e-6)


def test_statistics_that_are_not_there_are_refused_with_a_remedy() -> None:
    params = {"w": jnp.ones(3)}
    clip = adaptive_grad_clip(0.1, keeps_ratios=True)
    for tx, count in ((optax.adam(1.0), 0), (adaptive_grad_clip(0.1), 0), (optax.chain(clip, clip), 2)):
        with pytest.raises(ConfigError, match=f"ratios of {count} .*keeps_ratios=True"):
            agc_statistics(tx.init(params))
    exempt = adaptive_grad_clip(0.1, mask={"w": False}, keeps_ratios=True)
    with pytest.raises(ConfigError, match="every parameter is exempt"):
        agc_statistics(exempt.init(params))


def test_layers_are_recorded_about_200_times_and_never_more_often_than_metrics() -> None:
    for num_steps, every in ((50, 10), (2_000, 10), (112_000, 100), (1, 1), (999, 7)):
        due = [step for step in range(every, num_steps + 1, every) if is_due(step, num_steps, every, None)]
        assert min(num_steps // every, 100) <= len(due) <= 201, (num_steps, every, len(due))
    assert [step for step in range(10, 101, 10) if is_due(step, 1000, 10, 25)] == [50, 100]


def test_the_record_of_layers_does_not_wait_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = agc_statistics(adaptive_grad_clip(0.1, keeps_ratios=True).init({"w": jnp.ones((2, 3))})).layers
    log = LayerLog(tmp_path / "agc.jsonl", resume_step=0)
    log.write(10, units)
    assert not (tmp_path / "agc.jsonl").exists()
    monkeypatch.setattr(layers, "_FLUSH_S", 0.0)
    log.write(20, units)
    assert [json.loads(line)["step"] for line in (tmp_path / "agc.jsonl").read_text().splitlines()] == [10, 20]


def test_the_record_of_layers_holds_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "agc.jsonl"
    units = agc_statistics(adaptive_grad_clip(0.1, keeps_ratios=True).init({"w": jnp.ones((2, 3))})).layers
    log = LayerLog(path, resume_step=0)
    for step in (10, 20, 30):
        log.write(step, units)
    log.flush()
    for resume_step in (30, 20):
        with path.open("ab") as file:
            file.write(b'{"step": 40, "lay')  # cut short when a process was killed
        log = LayerLog(path, resume_step=resume_step)
        log.write(resume_step + 10, units)
        log.flush()
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert [row["step"] for row in rows] == list(range(10, resume_step + 11, 10))
    assert rows[0] == {"step": 10, "layers": {"w": [0.0, 0.0, 0.0]}}


def test_one_warning_if_everything_or_nothing_is_clipped_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ClippingWatch()
    for step in range(10, 2000, 10):
        watch.notice(step, 0.95 if step != 300 else 0.5, 0.01)
    text = capsys.readouterr().err
    assert text.count("nfnet:") == 1
    assert "more than 90% of all units since step 310" in text
    assert "--optim.clipping.ratio (it is 0.01)" in text
    watch = ClippingWatch()
    for step in range(10, 2000, 10):
        watch.notice(step, 0.0, 0.64)
    text = capsys.readouterr().err
    assert text.count("nfnet:") == 1
    assert "has not scaled down any unit since step 10" in text
    watch = ClippingWatch()
    for step in range(10, 2000, 10):
        watch.notice(step, 0.3, 0.64)
    assert capsys.readouterr().err == ""
