"""Methods, clipping, groups and schedules against plain Optax, on arrays with the names of a network of 12 blocks."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import from_json, to_json
from nfnet_flax.models import ExecutionConfig
from nfnet_flax.optim import (
    AGC,
    LAMB,
    SGD,
    Adafactor,
    AdamW,
    ClipValue,
    Constant,
    Cosine,
    ExponentialDecay,
    GlobalNorm,
    Linear,
    Lion,
    Muon,
    OptimConfig,
    ParamGroup,
    RAdam,
    RMSProp,
    RunLength,
    Steps,
    groups_table,
    layer_decay,
    make_optimizer,
    schedules,
)
from nfnet_flax.optim.clipping import Clipping
from nfnet_flax.optim.methods import Method
from nfnet_flax.training.state import model_structure
from tests.networks import SMALL

Params = dict[str, jax.Array]
Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
DECAY, RATIO, MAX_NORM, MAX_ABS = 0.1, 0.05, 2.0, 0.1


def rate(step: jax.typing.ArrayLike) -> jax.Array:
    """A learning rate that changes at every step."""
    return 0.02 / (1.0 + jnp.asarray(step, jnp.float32))


def network(depth: int, seed: int, *, same_blocks: bool = False) -> Params:
    """Arrays with the names and the number of axes of a network with one stage."""
    rng = np.random.default_rng(seed)
    found = {"stem.kernel": rng.standard_normal((3, 3, 3, 6)), "stem.gain": rng.standard_normal(6)}
    blocks = [{"conv.kernel": rng.standard_normal((3, 3, 2, 6)), "skip_gain": rng.standard_normal(())}]
    head = {"kernel": rng.standard_normal((6, 5)), "bias": rng.standard_normal(5)}
    while len(blocks) < depth:
        own = {name: rng.standard_normal(value.shape) for name, value in blocks[0].items()}
        blocks.append(blocks[0] if same_blocks else own)
    for index, values in enumerate(blocks):
        found |= {f"stages.0.{index}.{name}": value for name, value in values.items()}
    found |= {f"head.{name}": value for name, value in head.items()}
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}


def decays(params: Params) -> dict[str, bool]:
    """Which parameters decay in a default configuration."""
    return {name: name.endswith("kernel") for name in params}


DECAYED = optax.add_decayed_weights(DECAY, decays)
DECOUPLED = optax.add_decayed_weights(lambda step: -DECAY * rate(step), decays)


def matrices(params: Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """What Muon takes for matrices."""
    convolution = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    return {name: convolution if name.endswith("conv.kernel") or name == "stem.kernel" else None for name in params}


METHODS: dict[str, tuple[Method, optax.GradientTransformation]] = {
    "sgd": (SGD(momentum=0.8), optax.chain(DECAYED, optax.sgd(rate, 0.8, nesterov=True))),
    "rmsprop": (
        RMSProp(decay=0.8, eps=1e-2, momentum=0.7),
        optax.chain(DECAYED, optax.rmsprop(rate, 0.8, 1e-2, initial_scale=1.0, eps_in_sqrt=True, momentum=0.7)),
    ),
    "adamw": (AdamW(b1=0.8), optax.adamw(rate, b1=0.8, weight_decay=DECAY, mask=decays)),
    "radam": (RAdam(b2=0.9), optax.chain(optax.radam(rate, b2=0.9), DECOUPLED)),
    "lion": (Lion(b2=0.98), optax.lion(rate, b2=0.98, weight_decay=DECAY, mask=decays)),
    "lamb": (LAMB(eps=1e-5), optax.lamb(rate, eps=1e-5, weight_decay=DECAY, mask=decays)),
    "adafactor": (
        Adafactor(min_dim_size_to_factor=3),
        optax.adafactor(
            rate,
            min_dim_size_to_factor=3,
            weight_decay_rate=lambda step: DECAY * rate(step),
            weight_decay_mask=decays,
        ),
    ),
    "muon": (
        Muon(num_iterations=2, adam_b2=0.99),
        optax.chain(
            optax.contrib.muon(rate, ns_steps=2, adam_b2=0.99, muon_weight_dimension_numbers=matrices), DECOUPLED
        ),
    ),
}
CLIPPING: dict[str, tuple[Clipping | None, optax.GradientTransformation]] = {
    "none": (None, optax.identity()),
    "agc": (
        AGC(ratio=RATIO),
        optax.masked(optax.adaptive_grad_clip(RATIO), lambda params: {name: name != "head.kernel" for name in params}),
    ),
    "global_norm": (GlobalNorm(max_norm=MAX_NORM), optax.clip_by_global_norm(MAX_NORM)),
    "value": (ClipValue(max_abs=MAX_ABS), optax.clip(MAX_ABS)),
}


COMPILED = ("muon",)
"""Methods whose loops would otherwise be compiled at every step."""


def after(
    tx: optax.GradientTransformation, depth: int, num_steps: int, *, jit: bool, same_blocks: bool = False
) -> Params:
    """The parameters that an optimizer, ours or Optax's own, leads to; gradients are of very different sizes."""
    params = network(depth, 0, same_blocks=same_blocks)
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for number in range(num_steps):
        random = network(depth, 100 + number, same_blocks=same_blocks)
        gradient = {name: 10.0 ** (number % 3 - 2) * value for name, value in random.items()}
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_are_those_of_plain_optax(method: str) -> None:
    (ours, theirs), (our_clip, their_clip) = METHODS[method], CLIPPING["agc"]
    config = OptimConfig(method=ours, clipping=our_clip, weight_decay=DECAY)
    start, jit = network(12, 0), method in COMPILED
    got = after(make_optimizer(config, rate, start), 12, 10, jit=jit)
    compare(got, after(optax.chain(their_clip, theirs), 12, 10, jit=jit), start)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("method", METHODS)
def test_any_clipping_goes_before_any_method(method: str, clipping: str) -> None:
    (ours, theirs), (our_clip, their_clip) = METHODS[method], CLIPPING[clipping]
    config = OptimConfig(method=ours, clipping=our_clip, weight_decay=DECAY)
    start, jit = network(1, 0), method in COMPILED
    got = after(make_optimizer(config, rate, start), 1, 3, jit=jit)
    compare(got, after(optax.chain(their_clip, theirs), 1, 3, jit=jit), start)


def compare(got: Params, want: Params, start: Params) -> None:
    """That two networks are equal, and that each array has moved."""
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6 * float(jnp.max(jnp.abs(value))))
        assert not np.array_equal(value, start[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_moved_alike_at_any_depth(method: str) -> None:
    config = OptimConfig(method=METHODS[method][0], clipping=AGC(ratio=RATIO), weight_decay=DECAY)
    one, twelve = (
        after(make_optimizer(config, rate, network(depth, 0)), depth, 3, jit=method in COMPILED, same_blocks=True)
        for depth in (1, 12)
    )
    for name, value in twelve.items():
        part = f"stages.0.0.{name.split('.', 3)[3]}" if name.startswith("stages") else name
        np.testing.assert_allclose(value, one[part], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_groups_scale_and_freeze(method: str) -> None:
    params, gradient = network(2, 0), network(2, 1)
    groups = (ParamGroup("stages.0.1.*", 0.25), ParamGroup("stem.*", 0.0), ParamGroup("*", 1.0))
    updates = []
    for learning_rate_groups in ((ParamGroup("*", 1.0),), groups):
        config = OptimConfig(method=METHODS[method][0], learning_rate_groups=learning_rate_groups)
        tx = make_optimizer(config, rate, params)
        state = tx.init(params)
        named = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state) if hasattr(path[-1], "key")}
        assert named == params.keys() - tx.frozen
        update = jax.jit(tx.update) if method in COMPILED else tx.update
        updates.append(update(gradient, state, params)[0])
    whole, grouped = updates
    assert tx.frozen == {"stem.kernel", "stem.gain"}
    assert grouped.keys() == whole.keys() - tx.frozen
    for name, update in grouped.items():
        factor = 0.25 if name.startswith("stages.0.1") else 1.0
        np.testing.assert_allclose(update, factor * whole[name], rtol=1e-6)


@pytest.mark.parametrize("method", ["adamw", "radam", "lion", "adafactor", "muon"])
def test_decoupled_decay_is_the_learning_rate_times_the_groups_factor(method: str) -> None:
    params = network(1, 0)
    groups = (ParamGroup("*gain", 0.0), ParamGroup("head.*", 2.0), ParamGroup("*", 1.0))
    config = OptimConfig(method=METHODS[method][0], weight_decay=DECAY, weight_decay_groups=groups)
    tx = make_optimizer(config, rate, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for name, value in params.items():
        factor = 0.0 if name.endswith("gain") else 2.0 if name.startswith("head") else 1.0
        np.testing.assert_allclose(updates[name], -rate(0) * DECAY * factor * value, rtol=1e-6)


def test_clipping_shows_in_the_metrics_and_counts_what_is_trained() -> None:
    params = network(1, 0)
    gradient = {name: 1e-6 * value for name, value in params.items()} | {"stem.gain": 1e3 * params["stem.gain"]}
    frozen = (ParamGroup("stem.gain", 0.0), ParamGroup("*", 1.0))
    metrics: dict[str, float] = {}
    for clipping in (AGC(ratio=RATIO), GlobalNorm(max_norm=1.0)):
        for name, groups in (("all", (ParamGroup("*", 1.0),)), ("trained", frozen)):
            tx = make_optimizer(OptimConfig(clipping=clipping, learning_rate_groups=groups), rate, params)
            _, state = tx.update(gradient, tx.init(params), params)
            metrics |= {f"{name} {metric}": float(value) for metric, value in tx.metrics(state).items()}
    # Units: 6 of each convolution, and each vector and scalar; none of the head's kernel.
    assert metrics == {
        "all agc/clipped_fraction": pytest.approx(1 / 15),
        "trained agc/clipped_fraction": 0,
        "all global_norm/clipped": 1,
        "trained global_norm/clipped": 0,
    }
    assert make_optimizer(OptimConfig(clipping=None), rate, params).metrics(()) == {}


def test_the_global_norm_that_is_known_is_not_computed_again() -> None:
    params, gradient = network(1, 0), network(1, 1)
    tx = make_optimizer(OptimConfig(clipping=GlobalNorm(max_norm=1.0), weight_decay=0.0), rate, params)
    state, norm = tx.init(params), optax.tree.norm(gradient)
    found, known, double = (
        tx.update(gradient, state, params, global_norm=value)[0] for value in (None, norm, 2 * norm)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, known)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6), found, double)


def test_layer_decay_falls_from_the_head_to_the_stem() -> None:
    names = model_structure(SMALL["nfnet"], 3, ExecutionConfig()).shapes
    assert layer_decay(0.5, names) == (
        ParamGroup("stem*", 0.5**4),
        ParamGroup("stages.0.0.*", 0.5**3),
        ParamGroup("stages.1.0.*", 0.5**2),
        ParamGroup("stages.1.1.*", 0.5),
        ParamGroup("*", 1.0),
    )
    ten = layer_decay(0.9, (f"stages.{stage}.{block}.w" for stage in (1, 0) for block in range(11)))
    assert [group.pattern for group in ten[9:13]] == [f"stages.{place}.*" for place in ("0.9", "0.10", "1.0", "1.1")]
    assert ten[0].value == pytest.approx(0.9**22)
    groups = (ParamGroup("stem.*", 0.0), ParamGroup("head.*", 10.0), ParamGroup("*", 1.0))
    params = network(2, 0)
    config = OptimConfig(layer_decay=0.5, learning_rate_groups=groups, method=SGD(momentum=0.0), clipping=None)
    tx = make_optimizer(config, lambda step: 1.0, params)
    updates, _ = tx.update({name: jnp.ones_like(value) for name, value in params.items()}, tx.init(params), params)
    moved = [float(updates[name].ravel()[0]) for name in ("stages.0.0.skip_gain", "stages.0.1.skip_gain", "head.bias")]
    assert moved == [-0.25, -0.5, -10]
    assert tx.frozen == {"stem.kernel", "stem.gain"}
    with pytest.raises(ConfigError, match=r"optim\.layer_decay = 0\.5: the network has no parameters of blocks"):
        layer_decay(0.5, ("head.kernel",))


def test_schedules_are_optaxs_behind_a_warm_up() -> None:
    run = RunLength(warmup_steps=10, num_steps=60, steps_per_epoch=4.0)
    warm_up = optax.schedules.linear_schedule(0.0, 0.3, 10)

    def behind(schedule: optax.Schedule) -> optax.Schedule:
        return optax.schedules.join_schedules([warm_up, schedule], [10])

    falls = optax.schedules.exponential_decay(0.3, 8, 0.9, transition_begin=0, staircase=True)
    want: list[tuple[schedules.Schedule, optax.Schedule]] = [
        (
            Cosine(final_learning_rate=0.02),
            optax.schedules.warmup_cosine_decay_schedule(0.0, 0.3, 10, 60, end_value=0.02),
        ),
        (Constant(), behind(optax.schedules.constant_schedule(0.3))),
        (Linear(final_learning_rate=0.02), behind(optax.schedules.linear_schedule(0.3, 0.02, 50))),
        (
            Steps(factor=0.5, at_epochs=(4.0, 6.5, 6.6)),
            behind(optax.schedules.piecewise_constant_schedule(0.3, {6: 0.5, 16: 0.25})),
        ),
        (ExponentialDecay(factor=0.9, every_epochs=2.0), behind(lambda step: falls(step + 10))),
    ]
    for ours, theirs in want:
        got = ours.learning_rate(0.3, run)(np.arange(70))
        np.testing.assert_allclose(got, theirs(np.arange(70)), rtol=1e-5, atol=1e-8)
    for epochs in ((0.0,), (3.0, 2.0), (2.0, 2.0)):
        with pytest.raises(ConfigError, match=r"optim\.schedule\.at_epochs = .*must be positive and increase"):
            Steps(at_epochs=epochs)


def test_every_part_comes_back_from_json() -> None:
    schedules = (Cosine(), Constant(), Linear(), Steps(at_epochs=(1.0, 2.5)), ExponentialDecay())
    for method, _ in METHODS.values():
        for clipping, _ in CLIPPING.values():
            for schedule in schedules:
                config = OptimConfig(
                    method=method,
                    clipping=clipping,
                    schedule=schedule,
                    learning_rate_per_256=None,
                    learning_rate=1e-3,
                    layer_decay=0.75,
                )
                assert from_json(OptimConfig, json.loads(json.dumps(to_json(config)))) == config


def test_the_table_of_groups() -> None:
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in network(2, 0).items()}
    groups = (ParamGroup("stem.*", 0.0), ParamGroup("stages.0.0.*", 0.1), ParamGroup("*", 1.0))
    table = groups_table(OptimConfig(weight_decay=0.05, learning_rate_groups=groups), shapes)
    heading, columns, *rows = table.splitlines()
    assert heading == "parameters, by how they are updated:"
    assert columns.split("  ")[-1].strip() == "such as"
    assert [row.split() for row in rows] == [
        ["frozen", "-", "-", "2", "168", "stem.kernel"],
        ["x", "0.1", "0.05", "yes", "1", "108", "stages.0.0.conv.kernel"],
        ["x", "0.1", "0", "yes", "1", "1", "stages.0.0.skip_gain"],
        ["x", "1", "0.05", "yes", "1", "108", "stages.0.1.conv.kernel"],
        ["x", "1", "0", "yes", "2", "6", "stages.0.1.skip_gain"],
        ["x", "1", "0.05", "no", "1", "30", "head.kernel"],
    ]
    alike = OptimConfig(weight_decay=0.0, clipping=None)
    assert groups_table(alike, shapes) == (
        "all 8 arrays, 421 parameters: learning rate x 1, weight decay 0, clipped: no"
    )


def test_wrong_numbers_and_groups_are_named() -> None:
    params = network(1, 0)
    number: Any = 0.02

    def made(config: OptimConfig) -> object:
        return make_optimizer(config, rate, params)

    for message, make in {
        r"optim\.learning_rate = 1\.0: give optim\.learning_rate_per_256 or this": lambda: OptimConfig(
            learning_rate=1.0
        ),
        r"optim\.learning_rate = None: give": lambda: OptimConfig(learning_rate_per_256=None),
        r"optim\.clipping = 0\.02: give AGC\(ratio=0\.02\)": lambda: OptimConfig(clipping=number),
        r"optim\.method\.b2 = 1\.0: must lie in \[0, 1\)": lambda: AdamW(b2=1.0),
        r"optim\.method\.groups = .*use 1 \(Muon\) or 0 \(Adam\)": lambda: Muon(groups=(ParamGroup("*", 0.5),)),
        r"optim\.clipping\.groups = .*use 1 \(clip\) or 0 \(exempt\)": lambda: AGC(groups=(ParamGroup("*", 2.0),)),
        r"optim\.clipping\.max_norm = 0\.0": lambda: GlobalNorm(max_norm=0.0),
        r"optim\.layer_decay = 0\.0: must lie in \(0, 1\]": lambda: OptimConfig(layer_decay=0.0),
        r"must not be negative; 0 freezes": lambda: OptimConfig(learning_rate_groups=(ParamGroup("*", -1.0),)),
        r"freezes every parameter": lambda: made(OptimConfig(learning_rate_groups=(ParamGroup("*", 0.0),))),
        r"optim\.learning_rate_groups: pattern 'haed\.\*' matches no": lambda: made(
            OptimConfig(learning_rate_groups=(ParamGroup("haed.*", 0.0), ParamGroup("*", 1.0)))
        ),
        r"optim\.method\.groups: pattern 'fc\.\*' matches no": lambda: made(
            OptimConfig(method=Muon(groups=(ParamGroup("fc.*", 0.0), ParamGroup("*", 1.0))))
        ),
    }.items():
        with pytest.raises(ConfigError, match=message):
            make()
