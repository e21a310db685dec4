"""Weights in and out: round trips to the bit, one error that lists everything, and files that try to run code."""

import collections
import dataclasses
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import nfnet_flax
from nfnet_flax import cli, exit_codes, weights
from nfnet_flax.config import ConfigError
from nfnet_flax.models import Classifier, ModelConfig, build_model, model_config
from nfnet_flax.models.params import merge, split, update
from nfnet_flax.weights.entries import HostArrays, arrays_of, shapes_of
from nfnet_flax.weights.haiku import Tree
from nfnet_flax.weights.timm import timm_arrays
from tests import golden
from tests.networks import FAST_COMPILE, SMALL, relative
from tools import make_timm_golden


def with_random_arrays(config: ModelConfig, num_classes: int) -> Classifier:
    """A network whose arrays are all different, running statistics included."""
    model = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    arrays = {
        name: jnp.asarray(7 if dtype == np.int32 else rng.standard_normal(shape), dtype)
        for name, (shape, dtype) in shapes_of(model).items()
    }
    made: Classifier = merge(split(model)[0], arrays, {})
    return made


@pytest.fixture(scope="module")
def models() -> dict[str, Classifier]:
    """One small network of every family."""
    return {family: with_random_arrays(SMALL[family], 3) for family in SMALL}


def same(a: HostArrays, b: HostArrays) -> bool:
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)


def fresh(model: Classifier) -> Classifier:
    """The same network with other arrays."""
    copy: Classifier = nnx.clone(model)
    update(copy, {name: np.zeros_like(value) for name, value in arrays_of(copy).items()})
    return copy


def flat(tree: Tree) -> HostArrays:
    return {f"{module}/{name}": value for module, leaves in tree.items() for name, value in leaves.items()}


@pytest.mark.parametrize("family", ["nfnet", "nf_resnet", "nf_regnet", "resnet"])
def test_haiku_round_trip(models: dict[str, Classifier], family: str) -> None:
    tree = weights.to_haiku(models[family])
    copy = fresh(models[family])
    weights.from_haiku(copy, tree)
    assert same(arrays_of(copy), arrays_of(models[family]))
    assert same(flat(weights.to_haiku(copy)), flat(tree))


def test_timms_networks_of_a_published_name_are_named(models: dict[str, Classifier]) -> None:
    for family in ("nf_resnet", "nf_regnet"):
        with pytest.raises(ConfigError, match="they are timm_nf_resnet50, timm_nf_regnet_b1 and so on"):
            weights.to_timm(models[family])


@pytest.mark.parametrize("family", ["se_resnext_d", "efficientnet"])
def test_haiku_has_no_names_for_the_rest(models: dict[str, Classifier], family: str) -> None:
    with pytest.raises(ConfigError, match="plain ResNet only"):
        weights.to_haiku(models[family])
    with pytest.raises(ConfigError, match=r"for NFNet and timm's own networks only$"):
        weights.to_timm(models[family])


def test_haiku_state_of_batch_norm_is_checked(models: dict[str, Classifier]) -> None:
    model = fresh(models["resnet"])
    tree = weights.to_haiku(models["resnet"])
    hidden = tree["ResNet/~/final_bn/~/mean_ema"]["hidden"]
    np.testing.assert_allclose(hidden.ravel(), arrays_of(models["resnet"])["final_bn.mean"] * (1 - 0.9**7), rtol=1e-6)
    tree["ResNet/~/final_bn/~/mean_ema"]["hidden"] = hidden * 2
    with pytest.raises(ConfigError, match="batch_norm_decay"):
        weights.from_haiku(model, tree)
    params_only = {module: leaves for module, leaves in tree.items() if not module.endswith("_ema")}
    with pytest.raises(ConfigError, match=r"missing: \d+ \(res_block_v2 \d+, final_bn 3\), such as ResNet/~/\w+/~/"):
        weights.from_haiku(model, params_only)
    weights.from_haiku(model, params_only, skip=("*.mean", "*.variance", "*.count"))
    assert np.array_equal(arrays_of(model)["head.kernel"], tree["ResNet/~/linear"]["w"])


@pytest.mark.parametrize("family", ["nfnet", "timm_nfnet"])
def test_timm_round_trip(models: dict[str, Classifier], family: str) -> None:
    tensors = weights.to_timm(models[family])
    copy = fresh(models[family])
    weights.from_timm(copy, tensors)
    assert same(arrays_of(copy), arrays_of(models[family]))
    assert same(weights.to_timm(copy), tensors)


TIMM_NETWORKS: dict[str, ModelConfig] = {
    "timm_nfnet_f0": model_config("nfnet_f0", **weights.TIMM_FORM),
    "timm_test_nfnet": model_config("test_nfnet"),
    "timm_eca_nfnet_l0": model_config("eca_nfnet_l0"),
    "timm_nf_regnet_b1": model_config("timm_nf_regnet_b1"),
    "timm_nf_resnet26": model_config("timm_nf_resnet26"),
    "timm_nf_seresnet26": model_config("nf_seresnet26"),
}
"""Name of a golden -> our network that computes the same."""


@pytest.mark.parametrize("name", TIMM_NETWORKS)
def test_timm_computes_the_same(name: str) -> None:
    stored = np.load(golden.FOLDER / f"{name}.npz")
    tensors = {name: make_timm_golden.fill(name, tuple(shape)) for name, shape in json.loads(str(stored["params"]))}
    model = nnx.eval_shape(lambda: build_model(TIMM_NETWORKS[name], num_classes=1000, rngs=nnx.Rngs(0)))
    params = {name: jnp.asarray(value) for name, value in timm_arrays(model, tensors).items()}

    def run(params: dict[str, jax.Array], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = merge(split(model)[0], params, {})
        network.eval()
        return network(images), network.features(images)

    logits, features = jax.jit(run, compiler_options=FAST_COMPILE)(params, make_timm_golden.images())
    assert relative(logits, stored["logits"]) < 1e-5
    if "features" in stored:
        assert relative(features, stored["features"]) < 1e-5
    network = merge(split(model)[0], params, {})
    assert same(weights.to_timm(network), tensors)


@pytest.mark.parametrize("family", SMALL)
def test_portable_round_trip(models: dict[str, Classifier], family: str, tmp_path: Path) -> None:
    path = tmp_path / "some" / "weights.safetensors"
    weights.save_weights(path, models[family], source="a test", parameters="ema")
    info, _ = weights.read_weights(path)
    assert (info.model, info.num_classes, info.source, info.parameters) == (SMALL[family], 3, "a test", "ema")
    copy = fresh(models[family])
    weights.load_weights(copy, path)
    assert same(arrays_of(copy), arrays_of(models[family]))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_another_head_is_left_out_by_name(models: dict[str, Classifier], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights.save_weights(path, models["nfnet"], source="a test", parameters="raw")
    model = with_random_arrays(SMALL["nfnet"], 7)
    head = arrays_of(model)["head.kernel"]
    with pytest.raises(ConfigError, match=r"a head of 3 classes, not 7: ask for num_classes = 3, or .* 'head\.\*'"):
        weights.load_weights(model, path)
    with pytest.raises(ConfigError, match=r"'haed\.\*' matches no parameter"):
        weights.load_weights(model, path, skip=("haed.*",))
    weights.load_weights(model, path, skip=("head.*",))
    assert np.array_equal(arrays_of(model)["head.kernel"], head)
    assert np.array_equal(arrays_of(model)["stem.0.kernel"], arrays_of(models["nfnet"])["stem.0.kernel"])


@pytest.mark.parametrize("channels", [1, 5])
def test_weights_for_colours_start_a_network_with_other_channels_or_without_a_head(
    models: dict[str, Classifier], channels: int, tmp_path: Path
) -> None:
    weights.save_weights(tmp_path / "a.safetensors", models["timm_nfnet"], source="a test", parameters="raw")
    config = dataclasses.replace(models["timm_nfnet"].config, in_channels=channels)
    model = build_model(config, num_classes=0, rngs=nnx.Rngs(1))
    weights.load_weights(model, tmp_path / "a.safetensors")
    stored, loaded = arrays_of(models["timm_nfnet"]), arrays_of(model)
    kernel = stored.pop("stem.0.kernel")
    wanted = kernel.sum(axis=2, keepdims=True) if channels == 1 else kernel[:, :, [0, 1, 2, 0, 1]] * np.float32(0.6)
    assert np.array_equal(loaded.pop("stem.0.kernel"), wanted)
    assert same(loaded, {name: value for name, value in stored.items() if not name.startswith("head.")})
    copy = build_model(models["timm_nfnet"].config, num_classes=0, rngs=nnx.Rngs(1))
    weights.from_timm(copy, weights.to_timm(models["timm_nfnet"]))
    assert np.array_equal(arrays_of(copy)["final_conv.kernel"], stored["final_conv.kernel"])


def test_every_problem_is_listed_and_nothing_is_loaded(models: dict[str, Classifier]) -> None:
    model = fresh(models["nfnet"])
    tree = weights.to_haiku(models["nfnet"])
    del tree["NFNet/~/stem_conv0"]["gain"]
    tree["NFNet/~/extra"] = {"w": np.zeros(3, np.float32)}
    tree["NFNet/~/linear"]["b"] = np.zeros(4, np.float32)
    tree["NFNet/~/stem_conv1"]["w"] = tree["NFNet/~/stem_conv1"]["w"].copy()
    tree["NFNet/~/stem_conv1"]["w"][0, 0, 0, 0] = np.nan
    tree["NFNet/~/stem_conv2"]["bias"] = np.asarray(["a"] * 64)
    tree["NFNet/~/stem_conv3"]["bias"] = tree["NFNet/~/stem_conv3"]["bias"].astype(np.float64) + 1e-12
    with pytest.raises(ConfigError) as refused:
        weights.from_haiku(model, tree)
    for problem in (
        "missing: NFNet/~/stem_conv0/gain",
        "unexpected: NFNet/~/extra/w (3,)",
        "misshaped: NFNet/~/linear/b is (4,), expected (3,)",
        "not finite: NFNet/~/stem_conv1/w holds 1 NaN",
        "not a number: NFNet/~/stem_conv2/bias",
        "not exact: NFNet/~/stem_conv3/bias",
    ):
        assert problem in str(refused.value)
    assert not any(np.any(value) for value in arrays_of(model).values())


def test_create_model_starts_from_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    stored = with_random_arrays(model_config("efficientnet_b0"), 3)
    weights.save_weights(path, stored, source="a test", parameters="raw")
    model = nfnet_flax.create_model("efficientnet_b0", num_classes=3, rngs=nnx.Rngs(0), weights=path, drop_rate=0.0)
    assert same(arrays_of(model), arrays_of(stored))
    assert model.drop_rate == 0.0


class RunsCode:
    """What a malicious file holds: reading it with a plain unpickler makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """A file like the published ones, of the smallest named NFNet-like network, and what it holds."""
    config = model_config("nf_regnet_b0")
    model = nnx.eval_shape(lambda: build_model(config, num_classes=5, rngs=nnx.Rngs(0)))
    tree: Tree = {}
    for entry in weights.haiku.haiku_entries(model):
        module, name = entry.theirs.rsplit("/", 1)
        tree.setdefault(module, {})[name] = golden.fill(entry.theirs, entry.shape)
    path = tmp_path_factory.mktemp("published") / "B0_haiku.npz"
    path.write_bytes(pickle.dumps(collections.OrderedDict(tree)))
    return path, tree


def convert(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["convert", *argv])
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_published_file_is_converted(
    published: tuple[Path, Tree], protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "B0_haiku.npz"
    path.write_bytes(pickle.dumps(published[1], protocol=protocol))
    out = tmp_path / "out"
    code, printed = convert(
        "haiku", str(path), "--model", "nf_regnet_b0", "--out", str(out), "--parameters", "ema", capsys=capsys
    )
    assert code == 0, printed
    info, arrays = weights.read_weights(out / "nf_regnet_b0.safetensors")
    assert (info.model, info.num_classes, info.parameters) == (model_config("nf_regnet_b0"), 5, "ema")
    assert info.source.startswith("B0_haiku.npz, SHA-256 ")
    assert np.array_equal(arrays["head.kernel"], published[1]["NF_RegNet/~/linear"]["w"])
    assert len(arrays) == len(flat(published[1]))


def test_files_that_are_not_weights_are_refused(
    published: tuple[Path, Tree], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tree = published
    victim = tmp_path / "was_executed"
    with_nan = {**tree, "NF_RegNet/~/linear": {**tree["NF_RegNet/~/linear"], "b": np.full(5, np.nan, np.float32)}}
    an_archive = tmp_path / "archive.npz"
    np.savez(an_archive, a=np.zeros(3))
    cases = {
        pickle.dumps({**tree, "NF_RegNet/~/extra": RunsCode(victim)}): "asks for posix.mkdir",
        pickle.dumps({**tree, "NF_RegNet/~/extra": {"w": Path("x")}}): "asks for pathlib",
        pickle.dumps(np.load): "asks for numpy.load",
        path.read_bytes()[:-100]: "damaged or not a pickle",
        b"": "it is empty",
        b"hello": "damaged or not a pickle",
        an_archive.read_bytes(): "a real .npz archive",
        pickle.dumps([1, 2]): "something else than {module: {name: array}}",
        pickle.dumps(with_nan): "not finite: NF_RegNet/~/linear/b holds 5 NaN",
        pickle.dumps({"NFNet/~/linear": tree["NF_RegNet/~/linear"]}): "unexpected: NFNet/~/linear/w",
    }
    for number, (content, reason) in enumerate(cases.items()):
        bad = tmp_path / f"bad{number}.npz"
        bad.write_bytes(content)
        code, printed = convert(
            "haiku", str(bad), "--model", "nf_regnet_b0", "--out", str(tmp_path / "out"), capsys=capsys
        )
        assert code == exit_codes.EXIT_BAD_INPUT
        assert reason in printed
    assert not victim.exists()
    assert not (tmp_path / "out").exists()
    code, printed = convert("haiku", str(path), "--model", "nf_regnet_b1", "--out", str(tmp_path), capsys=capsys)
    assert code == exit_codes.EXIT_BAD_INPUT
    assert "another variant?" in printed
    # The payload is real: a plain unpickler runs it.
    pickle.loads(pickle.dumps(RunsCode(victim)))
    assert victim.exists()


def test_a_file_of_timms_own_network_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = np.load(golden.FOLDER / "timm_test_nfnet.npz")
    path = tmp_path / "model.safetensors"
    save_file(
        {name: make_timm_golden.fill(name, tuple(shape)) for name, shape in json.loads(str(stored["params"]))}, path
    )
    words = ("timm", str(path), "--model", "test_nfnet", "--out", str(tmp_path))
    code, printed = convert(*words, "--timm-form", capsys=capsys)
    assert code == exit_codes.EXIT_BAD_INPUT
    assert "timm_form: test_nfnet always computes what timm computes; leave it out" in printed
    code, printed = convert(*words, capsys=capsys)
    assert code == 0, printed
    network = nfnet_flax.load_model(tmp_path / "test_nfnet.safetensors")
    network.eval()
    assert relative(network(jnp.asarray(make_timm_golden.images())), stored["logits"]) < 1e-5


def test_a_timm_file_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nnx.eval_shape(lambda: build_model(model_config("nfnet_f0"), num_classes=5, rngs=nnx.Rngs(0)))
    tensors = {
        entry.theirs: make_timm_golden.fill(entry.theirs, entry.shape) for entry in weights.timm.timm_entries(model)
    }
    path = tmp_path / "dm_nfnet_f0.safetensors"
    save_file(tensors, path)
    code, printed = convert(
        "timm", str(path), "--model", "nfnet_f0", "--out", str(tmp_path), "--timm-form", capsys=capsys
    )
    assert code == 0, printed
    info, arrays = weights.read_weights(tmp_path / "nfnet_f0.safetensors")
    assert info.model == model_config("nfnet_f0", **weights.TIMM_FORM)
    assert np.array_equal(arrays["head.kernel"], tensors["head.fc.weight"].T)
    code, printed = convert("timm", str(path), "--model", "nfnet_f1", "--out", str(tmp_path), capsys=capsys)
    assert code == exit_codes.EXIT_BAD_INPUT
    assert re.search(r"missing: \d+ \(stages \d+\), such as stages\.0\.1\.conv1\.bias", printed)
    assert len(printed.splitlines()) < 5
    for out, reason in ((tmp_path, "exists already"), (path, "is the name of a file")):
        code, printed = convert("timm", str(path), "--model", "nfnet_f0", "--out", str(out), capsys=capsys)
        assert code == exit_codes.EXIT_BAD_INPUT
        assert reason in printed
