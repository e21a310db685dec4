"""Networks against the published code's outputs and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import nfnet_flax
from nfnet_flax.config import ConfigError
from nfnet_flax.models import NFNet, NFNetConfig, convolution, example_keys, layers, list_models, model_config
from nfnet_flax.models.params import merge, split
from tests import golden

PARAMETER_COUNTS = {
    "nfnet_f0": 71_489_284,
    "nfnet_f1": 132_634_256,
    "nfnet_f2": 193_779_228,
    "nfnet_f3": 254_924_200,
    "nfnet_f4": 316_069_172,
    "nfnet_f5": 377_214_144,
    "nfnet_f6": 438_359_116,
    "nfnet_f7": 499_504_088,
    "nfnet_f0+": 118_824_516,
    "nfnet_f1+": 220_357_008,
    "nfnet_f2+": 321_889_500,
    "nfnet_f3+": 423_421_992,
    "nfnet_f4+": 524_954_484,
    "nfnet_f5+": 626_486_976,
    "nfnet_f6+": 728_019_468,
    "nfnet_f7+": 829_551_960,
}


def relative(got: jax.Array, want: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want)))


@pytest.mark.parametrize(("name", "config"), [("nfnet_tiny", golden.TINY), ("nfnet_f0", model_config("nfnet_f0"))])
def test_golden(name: str, config: NFNetConfig) -> None:
    want = golden.load(name)
    graphdef, params, published = golden.filled(config, want["meta"]["num_classes"])
    assert {path: list(shape) for path, shape in published.items()} == dict(want["params"])

    @jax.jit
    def run(params: dict[str, jax.Array], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = merge(graphdef, params)
        model.eval()
        return model(images), model.features(images)

    logits, pool = run(params, golden.images(want["meta"]))
    assert relative(logits, want["logits"]) < 1e-5
    assert relative(pool, want["pool"]) < 1e-5


def test_bfloat16_stays_near_the_golden() -> None:
    want = golden.load("nfnet_tiny")
    config = NFNetConfig(widths=golden.TINY.widths, depths=golden.TINY.depths, group_width=8, compute_dtype="bfloat16")
    graphdef, params, _ = golden.filled(config, 10)

    @jax.jit
    def run(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        model = merge(graphdef, params)
        model.eval()
        return model(images)

    logits = run(params, golden.images(want["meta"]))
    assert logits.dtype == jnp.float32
    assert relative(logits, want["logits"]) < 0.05


def test_parameter_counts_of_all_variants() -> None:
    counts = {}
    for name in list_models():
        model = nnx.eval_shape(lambda name=name: nfnet_flax.create_model(name, rngs=nnx.Rngs(0)))
        counts[name] = sum(leaf.size for leaf in split(model)[1].values())
    assert counts == PARAMETER_COUNTS


def test_every_parameter_gets_a_gradient() -> None:
    graphdef, params, _ = golden.filled(golden.TINY, 10)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(merge(graphdef, params)(images)))))(params)
    assert [name for name, value in gradient.items() if not np.any(np.asarray(value))] == []


def test_keys_are_needed_only_where_something_is_drawn() -> None:
    config = NFNetConfig(widths=(16, 16, 16, 16), depths=(1, 1, 1, 1), group_width=8, drop_rate=0.5)
    model = NFNet(config, num_classes=3, rngs=nnx.Rngs(0))
    images = jnp.ones((2, 32, 32, 3))
    with pytest.raises(ValueError, match=r"keys=.*model\.eval\(\)"):
        jax.eval_shape(lambda: model(images))
    keys = example_keys(jax.random.key(0), jnp.arange(2))
    assert jax.eval_shape(lambda: model(images, keys)).shape == (2, 3)
    model.eval()
    assert jax.eval_shape(lambda: model(images)).shape == (2, 3)


def test_what_is_drawn_belongs_to_the_example() -> None:
    keys = example_keys(jax.random.key(3), jnp.arange(4096))
    ones = jnp.ones((4096, 2))
    whole = layers.dropout(ones, 0.25, layers.layer_keys(keys, 1))
    part = layers.dropout(ones[1024:2048], 0.25, layers.layer_keys(keys[1024:2048], 1))
    assert np.array_equal(whole[1024:2048], part)
    assert np.mean(np.asarray(whole)) == pytest.approx(1.0, abs=0.02)
    assert set(np.unique(np.asarray(whole))) == {np.float32(0), np.float32(1 / 0.75)}
    dropped = layers.drop_path(ones, 0.25, layers.layer_keys(keys, 2))
    assert set(np.unique(np.asarray(dropped))) == {0.0, 1.0}
    assert np.mean(np.asarray(dropped)) == pytest.approx(0.75, abs=0.02)
    assert np.array_equal(dropped[:, 0], dropped[:, 1])


@pytest.mark.parametrize("size", [4, 5])
def test_avg_pool_counts_what_lies_inside(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, size, size, 2), np.float32)
    got = np.asarray(layers.avg_pool_2x2(jnp.asarray(x)))
    for row in range(got.shape[1]):
        for column in range(got.shape[2]):
            window = x[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert got[0, row, column] == pytest.approx(window.mean(axis=(0, 1)), abs=1e-6)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(
    ("window", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 2, 3), (3, 1, 3)]
)
def test_convolution_and_gradients_equal_the_librarys(size: int, window: int, stride: int, groups: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, size, size, 6), np.float32))
    kernel = jnp.asarray(rng.standard_normal((window, window, 6 // groups, 9), np.float32))

    def library(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with convolution.for_platform("cpu"):
            return convolution.conv2d(x, kernel, stride=stride, groups=groups)

    want, want_vjp = jax.vjp(library, x, kernel)
    got, got_vjp = jax.vjp(ours, x, kernel)
    cotangent = jnp.asarray(rng.standard_normal(want.shape, np.float32))
    for mine, theirs in zip((got, *got_vjp(cotangent)), (want, *want_vjp(cotangent)), strict=True):
        assert relative(mine, np.asarray(theirs)) < 1e-5


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'nfnet_f9'.*nfnet_f"):
        nfnet_flax.create_model("nfnet_f9", rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"unknown field of NFNetConfig 'droprate'.*drop_rate"):
        nfnet_flax.create_model("nfnet_f0", rngs=nnx.Rngs(0), droprate=0.1)
    with pytest.raises(ConfigError, match=r"NFNetConfig\.drop_rate = '0\.1': expected float"):
        model_config("nfnet_f0", drop_rate="0.1")
