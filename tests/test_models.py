"""Networks against the published code's outputs, timm's outputs, and counts."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nfnet_flax
from nfnet_flax.config import ConfigError
from nfnet_flax.models import (
    IMAGE_SIZES,
    Classifier,
    ModelConfig,
    NFNet,
    NFNetConfig,
    build_model,
    convolution,
    example_keys,
    layers,
    list_models,
    model_config,
)
from nfnet_flax.models.counts import COUNTS, Counts
from nfnet_flax.models.flops import forward_flops
from nfnet_flax.models.keys import initial_key, key_of_step
from nfnet_flax.models.params import merge, split
from tests import golden
from tests.networks import FAST_COMPILE, SMALL, relative
from tools import make_timm_golden

GOLDENS: dict[str, ModelConfig] = {
    "nfnet_tiny": golden.TINY,
    "nfnet_f0": model_config("nfnet_f0"),
    "nf_resnet50": model_config("nf_resnet50"),
    "nf_regnet_b0": model_config("nf_regnet_b0"),
    "resnet50_bn": model_config("resnet50"),
}


def run_golden(
    name: str, config: ModelConfig, read: Callable[[Classifier, jax.Array], Any], cast: str | None = None
) -> Any:
    """What `read` takes from the network on a golden's input and parameters."""
    want = golden.load(name)
    graphdef, params, batch_stats, published = golden.filled(config, want["meta"]["num_classes"])
    assert {path: list(shape) for path, shape in published.items()} == dict(want["params"])
    if cast is not None:
        params = {key: value.astype(cast) for key, value in params.items()}

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params: dict[str, jax.Array], images: jax.Array) -> Any:
        model = merge(graphdef, params, batch_stats)
        if want["meta"].get("mode") is None:  # BatchNorm's golden is of the training mode
            model.eval()
        return read(model, images)

    return run(params, golden.images(want["meta"]))


def everything(model: Classifier, images: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Logits, pooled features and signal statistics."""
    return model(images), model.features(images), model.signal_statistics(images)


def check_golden(name: str, config: ModelConfig, tolerance: float) -> None:
    want = golden.load(name)
    logits, pool, statistics = run_golden(name, config, everything)
    assert relative(logits, want["logits"]) < tolerance
    assert relative(pool, want["pool"]) < tolerance
    if want["metrics"]:
        assert statistics.keys() == {"avg_sq_mean", "avg_var", "res_avg_var"}
        assert sum(len(values) for values in statistics.values()) == len(want["metrics"])
        for key, values in statistics.items():
            published = np.asarray([want["metrics"][f"{key}_{depth}"] for depth in range(len(values))])
            np.testing.assert_allclose(values, published, rtol=tolerance)


# In training mode on 8 small images, BatchNorm amplifies rounding a hundredfold: in float32 the library's own
# convolutions end 2.7e-5 from the golden, and so do ours. Float64 shows that the network is the published one.
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("nfnet_tiny", 1e-5), ("nfnet_f0", 1e-5), ("nf_resnet50", 1e-5), ("nf_regnet_b0", 1e-5), ("resnet50_bn", 1e-4)],
)
def test_golden_in_float32(name: str, tolerance: float) -> None:
    check_golden(name, GOLDENS[name], tolerance)


@pytest.mark.parametrize("name", ["nfnet_tiny", "nf_resnet50", "resnet50_bn"])
def test_golden_in_float64(name: str) -> None:
    config = dataclasses.replace(GOLDENS[name], compute_dtype="float64")
    with pytest.raises(ConfigError, match="enable_x64"):
        build_model(config, num_classes=10, rngs=nnx.Rngs(0))
    with jax.enable_x64(True):
        check_golden(name, config, 1e-12)


@pytest.mark.parametrize("name", ["nfnet_tiny", "nf_resnet50"])
def test_bfloat16_is_nearer_than_casting_the_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = golden.load(name)["logits"]
    config = dataclasses.replace(GOLDENS[name], compute_dtype="bfloat16")
    logits = run_golden(name, config, Classifier.__call__)
    assert logits.dtype == jnp.float32
    assert relative(logits, want) < 0.05
    # What the published code does: parameters and the statistics of the standardization in bfloat16, too.
    monkeypatch.setattr(layers, "statistics_dtype", lambda dtype: dtype)
    everything_cast = run_golden(name, config, Classifier.__call__, cast="bfloat16")
    assert relative(logits, want) < relative(everything_cast, want)


def timm_efficientnet_names(name: str) -> str:
    """timm's name for one of ours."""
    path, leaf = name.rsplit(".", 1)
    leaf = {"kernel": "weight", "gain": "weight", "mean": "running_mean", "variance": "running_var"}.get(leaf, leaf)
    top = {"stem": "conv_stem", "stem_norm": "bn1", "final_conv": "conv_head", "final_norm": "bn2"}
    if not path.startswith("stages"):
        return f"{ {'head': 'classifier', **top}[path] }.{leaf}"
    _, stage, block, inner = path.split(".", 3)
    convs = ["expand", "depthwise", "project"] if stage != "0" else ["depthwise", "project"]
    modules = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl" if stage != "0" else "conv_pw"}
    modules |= {f"{conv}_norm": f"bn{position + 1}" for position, conv in enumerate(convs)}
    modules |= {"squeeze_excite.reduce": "se.conv_reduce", "squeeze_excite.expand": "se.conv_expand"}
    return f"blocks.{stage}.{block}.{modules[inner]}.{leaf}"


def test_efficientnet_equals_timms() -> None:
    stored = np.load(golden.FOLDER / "timm_efficientnet_b0.npz")
    shapes = {name: tuple(shape) for name, shape in json.loads(str(stored["params"]))}
    model = nnx.eval_shape(lambda: build_model(model_config("efficientnet_b0"), num_classes=1000, rngs=nnx.Rngs(0)))
    graphdef, params, batch_stats = split(model)
    used = set()

    def theirs(ours: str) -> jax.Array:
        name = timm_efficientnet_names(ours)
        used.add(name)
        value = make_timm_golden.fill(name, shapes[name])
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        return jnp.asarray(value.T if ours == "head.kernel" else value.reshape(params[ours].shape))

    filled = {name: theirs(name) for name in params}
    statistics = {
        name: jnp.zeros((), jnp.int32)
        if name.endswith("count")
        else jnp.asarray(make_timm_golden.fill(timm_efficientnet_names(name), value.shape))
        for name, value in batch_stats.items()
    }
    assert used | {timm_efficientnet_names(n) for n in batch_stats if not n.endswith("count")} == shapes.keys()

    def run(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        model = merge(graphdef, params, statistics)
        model.eval()
        return model(images)

    assert (
        relative(jax.jit(run, compiler_options=FAST_COMPILE)(filled, make_timm_golden.images()), stored["logits"])
        < 1e-5
    )


def test_the_table_of_counts_is_what_is_counted() -> None:
    assert list(COUNTS) == list_models()
    # Multiply-adds of one of each family, as tracing the deepest takes long.
    traced = (
        *("nfnet_f0", "nfnet_f1+", "nf_resnet50", "nf_regnet_b0", "resnet50", "se_resnext_d50", "efficientnet_b0"),
        *("eca_nfnet_l0", "timm_nf_regnet_b0", "nf_seresnet26"),
    )
    found = {}
    for name, stored in COUNTS.items():
        if (below := re.fullmatch(r"((?:timm_)?nfnet_f)([2-7])(\+?)", name)) is not None:
            # Every level has as many blocks more than the one below, all alike.
            one, base = (COUNTS[f"{below[1]}{level}{below[3]}"].parameters for level in (1, 0))
            found[name] = Counts(base + int(below[2]) * (one - base), stored.multiply_adds)
            continue
        model = nnx.eval_shape(lambda name=name: nfnet_flax.create_model(name, rngs=nnx.Rngs(0)))
        parameters = sum(leaf.size for leaf in split(model)[1].values())
        size = IMAGE_SIZES[name].train
        found[name] = Counts(parameters, forward_flops(model, size) if name in traced else stored.multiply_adds)
    assert found == COUNTS


@pytest.mark.parametrize("family", SMALL)
def test_every_parameter_gets_a_gradient(family: str) -> None:
    model = nnx.eval_shape(lambda: build_model(SMALL[family], num_classes=3, rngs=nnx.Rngs(0)))
    graphdef, shapes, statistics = split(model)
    batch_stats = golden.initial_statistics(statistics)
    rng = np.random.default_rng(0)
    # No zeros, from which nothing flows back (skip gains, some heads), and no parameter like another.
    params = {name: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()}
    images = rng.standard_normal((4, 32, 32, 3), np.float32)
    keys = example_keys(jax.random.key(0), jnp.arange(4))

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        with convolution.for_platform("gpu"):  # the library's convolutions: fewer operations to compile
            return jnp.sum(jnp.square(merge(graphdef, params, batch_stats)(images, keys)))

    gradient = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(params)
    assert [name for name, value in gradient.items() if not np.any(np.asarray(value))] == []


# arXiv 2102.06171, table 1; the other families' published code.
SIZES = {
    "nfnet_f0": (192, 256),
    "nfnet_f3": (320, 416),
    "nfnet_f7+": (480, 608),
    "nf_regnet_b4": (320, 384),
    "efficientnet_b3": (300, 300),
    "resnet50": (224, 224),
    "nf_resnet101": (224, 224),
    "se_resnext_d50": (224, 224),
}


def test_image_sizes_equal_the_published() -> None:
    assert list(IMAGE_SIZES) == list_models()
    assert {name: (IMAGE_SIZES[name].train, IMAGE_SIZES[name].test) for name in SIZES} == SIZES


# arXiv 2102.06171, table 3, in units of 1e9; they are counted at the test resolution.
@pytest.mark.parametrize(("name", "published"), [("nfnet_f0", 12.38), ("nfnet_f1", 35.54), ("nfnet_f6", 377.28)])
def test_flops_equal_the_published(name: str, published: float) -> None:
    config = model_config(name)
    model = nnx.eval_shape(lambda: build_model(config, num_classes=1000, rngs=nnx.Rngs(0)))
    assert forward_flops(model, IMAGE_SIZES[name].test) / 1e9 == pytest.approx(published, rel=0.005)


def test_keys_are_needed_only_where_something_is_drawn() -> None:
    config = NFNetConfig(widths=(16, 16), depths=(1, 1), group_width=8, drop_rate=0.5)
    model = NFNet(config, num_classes=3, rngs=nnx.Rngs(0))
    images = jnp.ones((2, 32, 32, 3))
    with pytest.raises(ValueError, match=r"keys=.*model\.eval\(\)"):
        jax.eval_shape(lambda: model(images))
    keys = example_keys(jax.random.key(0), jnp.arange(2))
    assert jax.eval_shape(lambda: model(images, keys)).shape == (2, 3)
    for wrong in (keys[:1], keys[0], jax.random.key_data(keys)[0]):
        with pytest.raises(ConfigError, match="give 2 keys, one for each image"):
            jax.eval_shape(lambda wrong=wrong: model(images, wrong))
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
    rescaled = layers.drop_path(ones, 0.25, layers.layer_keys(keys, 2), rescale=True)
    assert set(np.unique(np.asarray(rescaled))) == {np.float32(0), np.float32(1 / 0.75)}
    dropped = layers.drop_path(ones, 0.25, layers.layer_keys(keys, 2))
    assert set(np.unique(np.asarray(dropped))) == {0.0, 1.0}
    assert np.mean(np.asarray(dropped)) == pytest.approx(0.75, abs=0.02)
    assert np.array_equal(dropped[:, 0], dropped[:, 1])


def test_keys_of_examples_are_made_of_one_key_and_a_list_of_rows() -> None:
    key = jax.random.key(0)
    for rows in (1, jnp.zeros((2, 2), jnp.int32), jnp.ones(3)):
        with pytest.raises(ConfigError, match=r"rows = .*such as jnp\.arange\(N\)"):
            example_keys(key, rows)
    for wrong in (0, jax.random.split(key)):
        with pytest.raises(ConfigError, match=r"step_key = .*such as jax\.random\.key\(0\)"):
            example_keys(wrong, jnp.arange(2))  # type: ignore[arg-type]
    old = example_keys(jax.random.PRNGKey(0), np.arange(2))
    assert np.array_equal(jax.random.key_data(example_keys(key, jnp.arange(2))), old)


def test_no_parameter_is_drawn_from_the_key_of_an_example() -> None:
    # A network draws parameter n from the n-th key of its generator (`layers.InitRngs`).
    of_parameters = layers.InitRngs(nnx.Rngs(params=initial_key(7)))
    drawn = {jax.random.key_data(of_parameters.params()).tobytes() for _ in range(500)}
    for step in (0, 1, 2**31 - 1):
        of_rows = example_keys(key_of_step(7, step), jnp.arange(500))
        assert not drawn & {np.asarray(key).tobytes() for key in jax.random.key_data(of_rows)}


def test_a_seed_that_a_key_cannot_hold_is_refused() -> None:
    keys = [jax.random.key_data(initial_key(seed)).tobytes() for seed in (0, 1, 2**31, 2**32 - 1)]
    assert len(set(keys)) == len(keys)
    for seed in (-1, 2**32, 2**63, 10**30):
        for make in (initial_key, lambda seed: key_of_step(seed, 0)):
            with pytest.raises(ConfigError, match=rf"seed = {seed}: must lie in \[0, 2\*\*32\)"):
                make(seed)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'nfnet_f9'.*nfnet_f"):
        nfnet_flax.create_model("nfnet_f9", rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"unknown field of NFNetConfig 'droprate'.*drop_rate"):
        nfnet_flax.create_model("nfnet_f0", rngs=nnx.Rngs(0), droprate=0.1)
    with pytest.raises(ConfigError, match=r"NFNetConfig\.drop_rate = '0\.1': expected float"):
        model_config("nfnet_f0", drop_rate="0.1")


def mean_and_maximum(places: jax.Array) -> list[jax.Array]:
    return [jnp.mean(places, axis=(1, 2)), jnp.max(places, axis=(1, 2))]


@pytest.mark.parametrize("family", SMALL)
def test_channels_pools_and_networks_without_a_head(family: str) -> None:
    config = dataclasses.replace(SMALL[family], in_channels=2, global_pool="catavgmax")
    model = build_model(config, num_classes=5, rngs=nnx.Rngs(0))
    model.eval()
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 2))
    places = model.feature_map(images)
    assert places.shape[0] == 2
    assert min(places.shape[1:3]) > 0
    features = model.features(images)
    assert np.array_equal(features, jnp.concatenate(mean_and_maximum(places), axis=-1))
    assert model(images).shape == (2, 5)
    with pytest.raises(ConfigError, match=r"images.shape = .*height, width, 2\)"):
        model(images[..., :1])
    headless = build_model(dataclasses.replace(config, global_pool="avgmax"), num_classes=0, rngs=nnx.Rngs(0))
    headless.eval()
    assert np.array_equal(headless(images), 0.5 * sum(mean_and_maximum(headless.feature_map(images))))
    assert not any(name.startswith("head.") for name in split(headless)[1])


def test_images_that_are_no_batch_of_normalised_ones_are_refused_by_name() -> None:
    model = nnx.eval_shape(lambda: build_model(SMALL["nfnet"], num_classes=3, rngs=nnx.Rngs(0)))
    model.eval()
    wrong: list[tuple[Any, str]] = [
        (jnp.zeros((32, 32, 3)), r"images\.shape = \(32, 32, 3\): give .*images\[None\] is a batch of one"),
        (jnp.zeros((2, 3, 32, 32)), r"images\.shape = \(2, 3, 32, 32\): give a jax\.Array of \(N, height, width, 3\)"),
        (jnp.zeros((2, 32, 32, 1)), r"images\.shape = \(2, 32, 32, 1\)"),
        (jnp.zeros((2, 0, 32, 3)), r"images\.shape = \(2, 0, 32, 3\)"),
        (jnp.zeros((2, 32, 32, 3), jnp.uint8), r"images\.dtype = 'uint8': grey levels must be normalised first"),
        (np.zeros((2, 32, 32, 3), np.int64), r"images\.dtype = 'int64'"),
        ([[0.0]], r"images = 'list': give a jax\.Array"),
    ]
    for images, message in wrong:
        for call in (model, model.features, model.signal_statistics):
            with pytest.raises(ConfigError, match=message.replace("int64", "int(64|32)")):
                call(images)
