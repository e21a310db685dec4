"""AGC, parameter groups and the whole optimizer against independent computations."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models.params import merge
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import (
    AGC,
    SGD,
    Constant,
    Cosine,
    ExponentialDecay,
    Linear,
    OptimConfig,
    ParamGroup,
    RunLength,
    SAMConfig,
    adaptive_grad_clip,
    assign,
    make_optimizer,
    make_schedule,
)
from nfnet_flax.optim.optimizer import update_ema
from nfnet_flax.optim.sam import ascend
from tests import golden
from tests.networks import FAST_COMPILE

UNIT_AXES: dict[int, tuple[int, ...]] = {0: (), 1: (0,), 2: (0,), 3: (0,), 4: (0, 1, 2)}


def clip_with_numpy(gradient: np.ndarray, weight: np.ndarray, clipping: float, eps: float) -> np.ndarray:
    """Unit by unit, in float64."""
    out = np.array(gradient, np.float64)
    axes = UNIT_AXES[gradient.ndim]
    units = list(np.ndindex(*[1 if axis in axes else size for axis, size in enumerate(gradient.shape)]))
    for unit in units:
        where = tuple(slice(None) if axis in axes else index for axis, index in enumerate(unit))
        norm = np.sqrt(np.sum(np.square(out[where])))
        limit = clipping * max(np.sqrt(np.sum(np.square(weight[where], dtype=np.float64))), eps)
        if norm > limit:
            out[where] = out[where] * limit / norm
    return out


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (1, 7), (3, 4, 5), (3, 3, 4, 6)])
def test_agc_equals_an_independent_computation(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    weight = rng.standard_normal(shape).astype(np.float32)
    gradient = (1e-3 * rng.standard_normal(shape)).astype(np.float32)
    if shape:
        gradient[..., 2] *= 1e4  # one loud unit among quiet ones
        weight[..., 3] = 0  # a unit at zero moves all the same
    tx = adaptive_grad_clip(0.01)
    got, state = tx.update({"w": jnp.asarray(gradient)}, tx.init({"w": weight}), {"w": jnp.asarray(weight)})
    want = clip_with_numpy(gradient, weight, 0.01, 1e-3)
    np.testing.assert_allclose(np.asarray(got["w"]), want, rtol=1e-5, atol=0)
    if len(shape) > 1:
        assert not np.allclose(want[..., 2], gradient[..., 2])
        assert 0 < float(state.clipped_fraction) < 1


def test_agc_takes_norms_that_are_known() -> None:
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal((3, 3, 4, 6), np.float32)) for name in "ab"}
    gradient = {name: 0.1 * value[::-1] for name, value in params.items()}
    every = (ParamGroup("*", 1.0),)
    config = OptimConfig(clipping=AGC(groups=every), weight_decay_groups=every)
    tx = make_optimizer(config, lambda step: 1.0, params)
    known = {"a": tuple(jnp.sqrt(jnp.sum(tree["a"] ** 2, (0, 1, 2), keepdims=True)) for tree in (gradient, params))}
    want, _ = tx.update(gradient, tx.init(params), params)
    got, _ = tx.update(gradient, tx.init(params), params, unit_norms={**known, "b": None})
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6), got, want)
    doubled = {"a": (2 * known["a"][0], known["a"][1]), "b": None}
    half, _ = tx.update(gradient, tx.init(params), params, unit_norms=doubled)
    assert not np.allclose(half["a"], want["a"])


def test_agc_needs_parameters_and_chains_with_any_optimizer() -> None:
    tx = optax.chain(adaptive_grad_clip(0.1), optax.adam(1e-3))
    params = {"w": jnp.ones((3, 2))}
    updates, _ = tx.update({"w": jnp.full((3, 2), 5.0)}, tx.init(params), params)
    assert np.all(np.asarray(optax.apply_updates(params, updates)["w"]) < 1)
    with pytest.raises(ValueError, match="params=params"):
        adaptive_grad_clip(0.1).update({"w": jnp.ones(3)}, tx.init(params)[0])
    zero, _ = adaptive_grad_clip(0.1).update({"w": jnp.zeros(3)}, tx.init(params)[0], {"w": jnp.zeros(3)})
    assert np.array_equal(zero["w"], np.zeros(3))


def test_agc_clips_the_state_of_any_nnx_module() -> None:
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(1)))
    tx = optax.chain(adaptive_grad_clip(0.01, eps=1e-3), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))

    def loss(model: Any) -> jax.Array:
        return jnp.sum(1e3 * model(jnp.asarray([[1.0, -2.0, 0.5]])) ** 2)

    gradient = nnx.grad(loss)(model)
    optimizer.update(model, gradient)
    after = nnx.state(model, nnx.Param)
    for old, new, loud in zip(*map(jax.tree.leaves, (before, after, gradient)), strict=True):
        want = old - clip_with_numpy(np.asarray(loud), old, 0.01, 1e-3)
        np.testing.assert_allclose(new, want, rtol=1e-5, atol=1e-7)
    wrongs: list[dict[str, Any]] = [{"clipping": 0.0}, {"clipping": -0.1}, {"clipping": 0.1, "eps": 0.0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="must be positive"):
            adaptive_grad_clip(**wrong)


@pytest.mark.parametrize("num_classes", [10, 3])
def test_the_heads_kernel_alone_is_exempt(num_classes: int) -> None:
    _, params, _, _ = golden.filled(golden.TINY, num_classes)
    config = OptimConfig(weight_decay=0.0, method=SGD(momentum=0.0))
    tx = make_optimizer(config, lambda step: 1.0, params)
    gradient = jax.tree.map(lambda weight: jnp.full(weight.shape, 1e3), params)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    unclipped = [name for name, update in updates.items() if np.array_equal(update, -gradient[name])]
    assert unclipped == ["head.kernel"]


def test_decay_spares_biases_and_gains() -> None:
    _, params, _, _ = golden.filled(golden.TINY, 10)
    tx = make_optimizer(OptimConfig(weight_decay=0.5, method=SGD(momentum=0.0)), lambda step: 1.0, params)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = {name for name, update in updates.items() if np.any(np.asarray(update))}
    assert decayed == {name for name in params if name.endswith(".kernel")}


def test_groups_are_complete_and_every_pattern_counts() -> None:
    names = ("a.kernel", "a.bias")
    assert assign("f", (ParamGroup("*.bias", 0.0), ParamGroup("*", 1.0)), names) == {"a.kernel": 1.0, "a.bias": 0.0}
    with pytest.raises(ConfigError, match=r"'\*\.scale' matches no parameter"):
        assign("f", (ParamGroup("*.scale", 0.0), ParamGroup("*", 1.0)), names)
    with pytest.raises(ConfigError, match=r"'a\.kernel' is in no group"):
        assign("f", (ParamGroup("*.bias", 0.0),), names)


def test_published_trajectory() -> None:
    want = json.loads((golden.FOLDER / "trajectory_tiny.json").read_text())
    steps, batch = want["steps"], want["batch"]
    rng = np.random.Generator(np.random.PCG64(want["seed"]))
    images = rng.standard_normal((steps, batch, 64, 64, 3), dtype=np.float32)
    labels = rng.integers(0, 10, (steps, batch))
    mix_labels = rng.integers(0, 10, (steps, batch))
    weights = rng.random((steps, batch))

    graphdef, params, _, _ = golden.filled(golden.TINY, 10)
    length = RunLength(warmup_steps=want["warmup_steps"], num_steps=steps, steps_per_epoch=1.0)
    schedule = Cosine().learning_rate(want["lr"] * batch / 256, length)
    np.testing.assert_allclose([schedule(i) for i in range(steps)], want["lr_per_step"], rtol=1e-5, atol=1e-9)
    config = OptimConfig(
        clipping=AGC(ratio=want["clipping"], eps=want["eps"]),
        weight_decay=want["weight_decay"],
        method=SGD(momentum=want["momentum"]),
        ema_decay=want["ema_decay"],
    )
    tx = make_optimizer(config, schedule, params)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def step(i: jax.Array, params: dict, ema: dict, opt_state: optax.OptState, batch: dict) -> tuple:
        def loss_fn(params: dict) -> jax.Array:
            model = merge(graphdef, params, {})
            model.eval()
            objective = SoftmaxCrossEntropy(label_smoothing=want["label_smoothing"])
            return jnp.mean(objective.train(model(batch["image"]), batch, {})[0])

        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return loss, optax.tree.norm(gradient), params, update_ema(ema, params, i, config.ema_decay), opt_state

    ema, opt_state, losses, norms = params, tx.init(params), [], []
    for i in range(steps):
        rows = {
            "image": images[i],
            "label": labels[i],
            "mix_label": mix_labels[i],
            "label_weight": weights[i].astype(np.float32),
        }
        loss, norm, params, ema, opt_state = step(jnp.asarray(i), params, ema, opt_state, rows)
        losses.append(float(loss))
        norms.append(float(norm))
    np.testing.assert_allclose(losses, want["loss"], rtol=1e-5)
    np.testing.assert_allclose(norms, want["grad_norm"], rtol=1e-5)
    assert float(optax.tree.norm(params)) == pytest.approx(want["final_param_norm"], rel=1e-6)
    assert float(optax.tree.norm(ema)) == pytest.approx(want["final_ema_norm"], rel=1e-6)


def test_the_warm_up_does_not_depend_on_the_length_of_the_run() -> None:
    configs = [OptimConfig(warmup_epochs=2.0, schedule=after) for after in (Cosine(), Linear(), Constant())]
    for config in [*configs, OptimConfig(warmup_epochs=2.0, schedule=ExponentialDecay(factor=0.9, every_epochs=1.0))]:
        schedules = [make_schedule(config, batch_size=64, steps_per_epoch=10.0, num_steps=n) for n in (5, 20, 1000)]
        rates = np.asarray([[schedule(step) for step in range(20)] for schedule in schedules])
        assert np.array_equal(rates[0], rates[1])
        assert np.array_equal(rates[0], rates[2])
        np.testing.assert_allclose(rates[0], 0.1 * 64 / 256 * np.arange(20) / 20, rtol=1e-6)


def test_sam_takes_the_gradient_uphill() -> None:
    # Foret et al., equations 2 and 3, on a parabola a * w**2 / 2 with gradient a * w.
    curvature = jnp.asarray([3.0, 0.5])
    params = {"w": jnp.asarray([1.0, -2.0]), "v": jnp.asarray([0.5])}
    gradient = {"w": curvature * params["w"], "v": jnp.asarray([0.0])}
    norm = optax.tree.norm(gradient)
    moved = ascend(params, gradient, norm, rho=0.05)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, moved, params))
    np.testing.assert_allclose(distance, 0.05, rtol=1e-5)
    assert float(jnp.sum(curvature * moved["w"] ** 2)) > float(jnp.sum(curvature * params["w"] ** 2))
    still = ascend(params, jax.tree.map(jnp.zeros_like, gradient), jnp.zeros(()), rho=0.05)
    assert np.array_equal(still["w"], params["w"])
    with pytest.raises(ConfigError, match="fraction = 0"):
        SAMConfig(fraction=0.0)
