"""How a network is computed does not change what it computes: rematerialized, folded, BatchNorm."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nfnet_flax
from nfnet_flax.config import ConfigError
from nfnet_flax.models import (
    Classifier,
    ExecutionConfig,
    NFNetConfig,
    ResNetConfig,
    build_model,
    convolution,
    example_keys,
    layers,
)
from nfnet_flax.models.params import (
    batch_stats_of,
    check_names,
    is_standardized,
    mark_prepared,
    merge,
    split,
)
from nfnet_flax.models.preparation import prepare, pull_back, unit_gradients
from nfnet_flax.models.stages import Rematerialization, run_stage
from nfnet_flax.models.standardization import StandardizationName, standardize
from nfnet_flax.objectives import Arrays, SoftmaxCrossEntropy
from nfnet_flax.optim.norms import global_norm
from nfnet_flax.training.gradient import make_part, normalise
from nfnet_flax.training.state import model_structure
from tests import golden
from tests.networks import FAST_COMPILE, SMALL, relative

DEEP: dict[str, NFNetConfig | ResNetConfig] = {
    "nfnet": dataclasses.replace(golden.TINY, depths=(1, 1, 4, 1), stochdepth_rate=0.5),
    "resnet": ResNetConfig(widths=(16, 16, 32, 32), depths=(1, 1, 4, 1), stem_width=8),
}


@pytest.mark.parametrize(("family", "choices"), [("nfnet", ("blocks",)), ("resnet", ("full",))])
def test_rematerialization_changes_nothing(family: str, choices: tuple[Rematerialization, ...]) -> None:
    """The same logits, gradients and running statistics."""
    whole: Any = nnx.eval_shape(lambda: build_model(DEEP[family], num_classes=3, rngs=nnx.Rngs(0)))
    _, shapes, statistics = split(whole)
    batch_stats = golden.initial_statistics(statistics)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()}
    images = jnp.asarray(rng.standard_normal((4, 32, 32, 3), np.float32))
    keys = example_keys(jax.random.key(0), jnp.arange(4))

    def run(rematerialization: Rematerialization) -> Any:
        whole.execution = ExecutionConfig(rematerialization=rematerialization)
        graphdef, _, _ = split(whole)

        def loss(params: Any) -> Any:
            model = merge(graphdef, params, batch_stats)
            with convolution.for_platform("gpu"):
                logits = model(images, keys)
            return jnp.sum(jnp.square(logits)), batch_stats_of(model)

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)(params)

    (want, want_statistics), want_gradient = run("none")
    for choice in choices:
        (got, got_statistics), got_gradient = run(choice)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for theirs, ours in ((want_gradient, got_gradient), (want_statistics, got_statistics)):
            assert theirs.keys() == ours.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(value))))


@pytest.mark.parametrize(("family", "num_rows_seen"), [("nfnet", 8), ("resnet", 3)])
def test_few_images_fill_a_tile_of_a_tpu(family: str, num_rows_seen: int) -> None:
    """The empty rows change neither loss nor gradient. With BatchNorm there are none."""
    structure = model_structure(SMALL[family], 5, ExecutionConfig(num_microbatches=1))
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(0.3 * rng.standard_normal(leaf.shape)) for name, leaf in structure.shapes.items()}
    statistics = golden.initial_statistics(structure.batch_stat_shapes)
    images = jnp.asarray(rng.standard_normal((3, 32, 32, 3)), jnp.float32)
    batch, keys = {"image": images, "label": jnp.arange(3)}, example_keys(jax.random.key(0), jnp.arange(3))
    arrays: Arrays = {}

    def run(platform: str) -> Any:
        part = make_part(structure, SoftmaxCrossEntropy(), platform, 1, frozenset(), is_normalised=True)
        traced = jax.jit(part, compiler_options=FAST_COMPILE).trace(statistics, arrays, params, keys, batch)
        shapes = [line for line in str(traced.jaxpr).splitlines() if "conv_general_dilated[" in line]
        return traced.lower().compile()(statistics, arrays, params, keys, batch), shapes

    (want, of_gpu), (got, of_tpu) = run("gpu"), run("tpu")
    assert f"f32[{num_rows_seen},16,16," in of_tpu[0]
    assert "f32[3,16,16," in of_gpu[0]
    assert want.keys() == got.keys()
    for name, value in want.items():
        largest = float(jnp.max(jnp.abs(value.value)))
        np.testing.assert_allclose(got[name].value, value.value, rtol=1e-4, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("family", DEEP)
def test_rematerialization_keeps_less_of_the_forward_pass(family: str) -> None:
    """Counted in what the backward pass is handed: of n blocks nothing but n, or about sqrt(n), inputs."""
    depth = 9
    config = dataclasses.replace(DEEP[family], depths=(1, 1, depth + 1, 1))
    network: Any = nnx.eval_shape(lambda: build_model(config, num_classes=3, rngs=nnx.Rngs(0)))
    blocks, specs = list(network.stages[2])[1:], network.specs[2][1:]
    graphdefs, params, batch_stats = zip(*map(split, blocks), strict=True)
    input_shape = jax.ShapeDtypeStruct((4, 64, 64, DEEP[family].widths[2]), jnp.float32)
    keys = example_keys(jax.random.key(0), jnp.arange(4))

    def num_kept_inputs(rematerialization: Rematerialization) -> float:
        def residuals(params: Any, batch_stats: Any, x: jax.Array) -> Any:
            def loss(params: Any) -> jax.Array:
                merged = [merge(*parts) for parts in zip(graphdefs, params, batch_stats, strict=True)]
                return jnp.sum(run_stage(merged, x, keys, specs, rematerialization))

            return jax.vjp(loss, params)[1]

        kept = jax.tree.leaves(jax.eval_shape(residuals, params, batch_stats, input_shape))
        given = jax.tree.leaves(params)
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in kept) - sum(leaf.size * 4 for leaf in given)
        return num_bytes / (input_shape.size * 4)

    assert num_kept_inputs("none") > 2 * depth
    assert num_kept_inputs("blocks") == pytest.approx(depth, abs=0.5)
    assert num_kept_inputs("full") == pytest.approx(math.sqrt(depth), abs=0.5)


@pytest.mark.parametrize("family", SMALL)
def test_one_rule_says_which_kernels_are_standardized(family: str) -> None:
    model: Any = nnx.eval_shape(lambda: build_model(SMALL[family], num_classes=3, rngs=nnx.Rngs(0)))
    mark_prepared(model)
    _, params, _ = split(model)
    marked = {
        ".".join(map(str, (*path, "kernel")))
        for path, module in nnx.iter_modules(model)
        if getattr(module, "is_prepared", False)
    }
    assert marked == {name for name in params if is_standardized(name, params)}
    assert bool(marked) == family.startswith(("nf", "timm"))
    assert "head.kernel" not in marked
    model.head.gain = nnx.Param(jnp.ones(3))
    with pytest.raises(ConfigError, match=r"head\.kernel of Dense: a kernel is standardized if its module has a gain"):
        check_names(model)


def test_images_that_are_not_normalised_give_no_number() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    mean, std = (123.0, 116.0, 103.0), (58.0, 57.0, 57.5)
    normal = normalise(jnp.asarray(levels), mean, std)
    np.testing.assert_allclose(normal, (levels - np.asarray(mean)) / np.asarray(std), rtol=1e-5, atol=1e-6)
    assert np.array_equal(normalise(normal, mean, std), normal)
    assert np.all(np.isnan(normalise(jnp.asarray(levels, jnp.float32), mean, std)))
    # A network that takes grey levels as they are.
    assert np.array_equal(normalise(jnp.asarray(levels, jnp.float32), (0.0,) * 3, (1.0,) * 3), levels)
    with pytest.raises(ConfigError, match="image = 'of type int32': give grey levels as uint8"):
        normalise(jnp.asarray(levels, jnp.int32), mean, std)


@pytest.mark.parametrize("form", ["published", "timm"])
def test_the_stated_gradient_of_the_standardization(form: StandardizationName) -> None:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 4, 5), np.float32)).at[..., 2].set(0.25)  # a constant unit
    gain = jnp.asarray(rng.standard_normal(5).astype(np.float32))
    cotangent = jnp.asarray(rng.standard_normal(kernel.shape, np.float32))

    def plainly(kernel: jax.Array, gain: jax.Array) -> jax.Array:
        centred = kernel - jnp.mean(kernel, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(centred), axis=(0, 1, 2))
        spread = jnp.maximum(36 * variance, 1e-4) if form == "published" else 36 * (variance + 1e-5)
        return centred / jnp.sqrt(spread) * gain

    want, want_vjp = jax.vjp(plainly, kernel, gain)
    got, got_vjp = jax.vjp(lambda kernel, gain: standardize(kernel, gain, form), kernel, gain)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got_vjp(cotangent), want_vjp(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(theirs))))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_norms_come_with_the_gradient(offset: float) -> None:
    # Kernels that are far from zero mean, too, beside a vector that is not standardized.
    rng = np.random.default_rng(1)
    shapes = {"a.kernel": (3, 3, 16, 5), "a.gain": (5,), "b.kernel": (1, 1, 12, 4), "b.gain": (4,), "c": (3,)}
    params = {name: jnp.asarray(offset + rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    dy = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    dy |= {name: jnp.zeros(shapes[name]) for name in ("a.gain", "b.gain")}
    prepared, facts = prepare(params, "published")
    assert facts.statistics.keys() == {"a.kernel", "b.kernel"}
    np.testing.assert_allclose(
        prepared["a.kernel"], standardize(params["a.kernel"], params["a.gain"], "published"), rtol=1e-6
    )
    units = unit_gradients(dy, params, facts, "published")
    gradient, norms = pull_back(dy, params, facts, units), units.norms
    for name in ("a.kernel", "b.kernel"):
        known = norms[name]
        assert known is not None
        for got, value in zip(known, (gradient[name], params[name]), strict=True):
            want = np.linalg.norm(np.asarray(value, np.float64).reshape(-1, value.shape[-1]), axis=0)
            np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5)
    flat = np.concatenate([np.ravel(np.asarray(value, np.float64)) for value in gradient.values()])
    np.testing.assert_allclose(global_norm(gradient, norms), np.linalg.norm(flat), rtol=1e-6)


@pytest.mark.parametrize("family", ["nfnet", "nf_resnet", "nf_regnet", "timm_nfnet"])
def test_the_folded_network_computes_the_same(family: str) -> None:
    config = SMALL[family]
    graphdef, shapes, _ = split(nnx.eval_shape(lambda: build_model(config, num_classes=3, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(0.5 + rng.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()}
    model = merge(graphdef, params, {})
    folded = nfnet_flax.fold(model)
    model.eval()
    images = jnp.asarray(rng.standard_normal((2, 32, 32, 3), np.float32))
    for want, got in zip(*(jax.tree.leaves(outputs(network, images)) for network in (model, folded)), strict=True):
        assert relative(got, np.asarray(want, np.float64)) < 1e-5
    with pytest.raises(ConfigError, match="folded already"):
        nfnet_flax.fold(folded)


def outputs(network: Classifier, images: jax.Array) -> Any:
    """Logits, features and signal statistics."""
    graphdef, params, batch_stats = split(network)

    def run(params: Any) -> Any:
        network = merge(graphdef, params, batch_stats)
        return network(images), network.features(images), network.signal_statistics(images)

    return jax.jit(run, compiler_options=FAST_COMPILE)(params)


def test_batch_norm_has_no_folded_form() -> None:
    model = nnx.eval_shape(lambda: build_model(SMALL["resnet"], num_classes=3, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match="ResNet cannot be folded; normalizer-free networks can"):
        nfnet_flax.fold(model)


def test_batch_norm_keeps_running_statistics_and_evaluates_with_them() -> None:
    rng = np.random.default_rng(0)
    norm = layers.BatchNorm(3, decay=0.9, epsilon=1e-5)
    batches = [rng.normal(2.0, 3.0, (4, 5, 5, 3)).astype(np.float32) for _ in range(10)]
    total_mean, total_variance, weight = np.zeros(3), np.zeros(3), 0.0
    for batch in batches:
        normal = np.asarray(norm(jnp.asarray(batch)))
        flat = batch.reshape(-1, 3).astype(np.float64)
        want = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
        np.testing.assert_allclose(normal.reshape(-1, 3), want, rtol=1e-4, atol=1e-5)
        total_mean = 0.9 * total_mean + 0.1 * flat.mean(0)
        total_variance = 0.9 * total_variance + 0.1 * flat.var(0)
        weight = 0.9 * weight + 0.1
    mean, variance = total_mean / weight, total_variance / weight
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.variance[...], variance, rtol=1e-5)
    assert int(norm.count[...]) == 10
    norm.eval()
    got = norm(jnp.asarray(batches[0]))
    np.testing.assert_allclose(got, (batches[0] - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-5)
    assert int(norm.count[...]) == 10


def test_a_whole_network_moves_its_statistics_in_training_only() -> None:
    graphdef, shapes, statistics = split(
        nnx.eval_shape(lambda: build_model(SMALL["resnet"], num_classes=3, rngs=nnx.Rngs(0)))
    )
    before = golden.initial_statistics(statistics)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()}
    images = jnp.asarray(rng.standard_normal((4, 32, 32, 3), np.float32))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def statistics_after_a_call() -> dict[str, dict[str, jax.Array]]:
        training, evaluating = (merge(graphdef, params, before) for _ in range(2))
        evaluating.eval()
        training(images)
        evaluating(images)
        return {"train": batch_stats_of(training), "eval": batch_stats_of(evaluating)}

    after = statistics_after_a_call()
    assert all(np.array_equal(before[name], value) for name, value in after["eval"].items())
    assert not any(np.array_equal(before[name], value) for name, value in after["train"].items())
