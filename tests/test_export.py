"""Exports compute what the network computes, are written as a person would write them, and say what is wrong."""

import collections
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx

import nfnet_flax
from nfnet_flax import cli, exit_codes, weights
from nfnet_flax.config import ConfigError
from nfnet_flax.export import ExportOptions, export_arrays, load_folded
from nfnet_flax.export.onnx_file import write_onnx
from nfnet_flax.export.options import network_for
from nfnet_flax.export.verify import compare, relative_difference
from nfnet_flax.models import Classifier, ModelConfig, NFNet, NFNetConfig, NFResNetConfig, model_config
from nfnet_flax.models.folding import fold_batch_norms
from nfnet_flax.models.layers import ACTIVATIONS, ActivationName, Conv, Dense, WSConv
from nfnet_flax.models.params import merge, split
from nfnet_flax.models.timm_nfnet import EfficientChannelAttention
from nfnet_flax.weights.entries import arrays_of
from tests.networks import FAST_COMPILE, SMALL, lifelike

NAMES = ("cat", "dog", "Zürich")
PREPARED = weights.Preprocessing(
    image_size=33,  # odd, so that SAME padding differs on both sides, and pools meet the border
    crop_margin=0,
    resampler="area_cubic",
    mean=(123.0, 110.0, 100.0),
    std=(50.0, 60.0, 70.0),
)
FAMILIES: dict[str, ModelConfig] = {
    **SMALL,
    "nf_resnet_plain": dataclasses.replace(SMALL["nf_resnet"], se_ratio=None),  # type: ignore[call-arg]
    "timm_nf_regnet": model_config("timm_nf_regnet_b1").small(),
    "timm_nf_resnet": model_config("timm_nf_resnet26").small(),
}


def save(path: Path, model: Classifier, class_names: tuple[str, ...] | None = NAMES) -> Path:
    weights.save_weights(
        path, model, source="a test", parameters="ema", class_names=class_names, preprocessing=PREPARED, overwrite=True
    )
    return path


def outputs(model: Classifier, images: np.ndarray) -> np.ndarray:
    graphdef, params, batch_stats = split(model)

    def run(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        result: jax.Array = merge(graphdef, params, batch_stats)(images)
        return result

    return np.asarray(jax.jit(run, compiler_options=FAST_COMPILE)(params, batch_stats, images))


def images_of(*, count: int = 20, size: int = 33, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, size, size, channels), np.float32)


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    """Results for batches of 1, 3 and all other images."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": part})[0] for part in np.split(images, [1, 4])])


def count_modules(model: Classifier, *kinds: type) -> int:
    return sum(isinstance(module, kinds) for _, module in nnx.iter_modules(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_computes_the_same_and_is_plain(family: str, tmp_path: Path) -> None:
    model = lifelike(FAMILIES[family], 3)
    written = nfnet_flax.export_model(save(tmp_path / "net.safetensors", model), tmp_path, to="onnx")
    assert [path.name for path in written.files] == ["net.onnx.json", "net.onnx"]
    images = images_of()
    assert relative_difference(run_onnx(written.path, images), outputs(model, images)) < 1e-5

    stored = onnx.load(written.path)
    onnx.checker.check_model(stored, full_check=True)
    assert [(entry.domain, entry.version) for entry in stored.opset_import] == [("", 20)]
    counts = collections.Counter(node.op_type for node in stored.graph.node)
    assert counts["Conv"] == count_modules(model, WSConv, Conv, EfficientChannelAttention)
    assert counts["Gemm"] == count_modules(model, Dense)
    assert counts["Transpose"] == 1
    known = {"Conv", "Gemm", "Transpose", "Relu", "Sigmoid", "Mul", "Add", "Reshape", "Flatten"}
    assert counts.keys() <= known | {"AveragePool", "MaxPool", "GlobalAveragePool", "Gelu"}
    kernels = {tensor.name for tensor in stored.graph.initializer if tensor.name.endswith(".kernel")}
    assert kernels == {name for name in arrays_of(model) if name.endswith(".kernel")}
    assert all(node.name == node.output[0] or node.output[0] == "logits" for node in stored.graph.node)


def test_what_is_known_of_the_network_is_inside_and_beside(tmp_path: Path) -> None:
    model = lifelike(SMALL["timm_nfnet"], 3)
    written = nfnet_flax.export_model(save(tmp_path / "net.safetensors", model), tmp_path / "new", to="onnx")
    facts = json.loads((tmp_path / "new" / "net.onnx.json").read_text())
    assert facts["class_names"] == list(NAMES)
    assert facts["preprocessing"]["mean"] == list(PREPARED.mean)
    assert facts["input"]["shape"] == ["batch", 33, 33, 3]
    assert facts["output"] == {"name": "logits", "shape": ["batch", 3], "dtype": "float32", "activation": "softmax"}
    assert "batches of 1 and 3, in onnxruntime" in facts["compared"]
    inside = {entry.key: entry.value for entry in onnx.load(written.path).metadata_props}
    assert {name: json.loads(inside[name]) for name in ("class_names", "preprocessing", "input", "model")} == {
        name: facts[name] for name in ("class_names", "preprocessing", "input", "model")
    }
    assert (inside["source"], inside["parameters"]) == ("a test", "ema")


def test_grey_levels_other_axes_half_precision_and_arrays_beside(tmp_path: Path) -> None:
    model = lifelike(SMALL["nfnet"], 3)
    path = save(tmp_path / "net.safetensors", model)
    grey = np.random.default_rng(0).integers(0, 256, (20, 3, 33, 33), np.uint8)
    floats = (grey.transpose(0, 2, 3, 1) - np.asarray(PREPARED.mean)) / np.asarray(PREPARED.std)
    wanted = outputs(model, floats.astype(np.float32))
    for dtype, tolerance in (("float32", 1e-5), ("float16", 1e-2)):
        options = ExportOptions(to="onnx", input="uint8", layout="nchw", dtype=dtype)  # type: ignore[arg-type]
        info, arrays = weights.read_weights(path)
        written = export_arrays("it", info, arrays, tmp_path, name=dtype, options=options, overwrite=False)
        assert relative_difference(run_onnx(written.path, grey), wanted) < tolerance
        stored = onnx.load(written.path)
        assert "Transpose" not in {node.op_type for node in stored.graph.node}
        types = {tensor.name: tensor.data_type for tensor in stored.graph.initializer}
        assert types["stages.0.0.conv0.kernel"] == (10 if dtype == "float16" else 1)
    sizes = [(tmp_path / f"{dtype}.onnx").stat().st_size for dtype in ("float32", "float16")]
    assert 1.5 < sizes[0] / sizes[1] < 2.1

    exported = network_for("it", *weights.read_weights(path), options)
    facts = json.loads((tmp_path / "float16.onnx.json").read_text())
    (tmp_path / "large").mkdir()
    names = write_onnx(tmp_path / "large", "net", exported, options, facts, max_bytes=1000)
    assert sorted(names) == ["net.onnx", "net.onnx.data"] == sorted(p.name for p in (tmp_path / "large").iterdir())
    assert relative_difference(run_onnx(tmp_path / "large" / "net.onnx", grey), wanted) < 1e-2


@pytest.mark.parametrize(("pool", "num_classes"), [("max", 3), ("avgmax", 0), ("catavgmax", 3), ("avg", 0)])
def test_pools_channels_and_networks_without_a_head(pool: str, num_classes: int, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL["nf_regnet"], in_channels=1, global_pool=pool)  # type: ignore[arg-type]
    model = lifelike(config, num_classes)
    path = save(tmp_path / "net.safetensors", model, class_names=None)
    written = nfnet_flax.export_model(path, tmp_path, to="onnx", image_size=24)
    images = images_of(size=24, channels=1)
    assert relative_difference(run_onnx(written.path, images), outputs(model, images)) < 1e-5
    assert onnx.load(written.path).graph.output[0].name == ("logits" if num_classes else "features")
    with pytest.raises(ConfigError, match="input = 'uint8': the weights record no mean and standard deviation of 1"):
        nfnet_flax.export_model(path, tmp_path, to="onnx", input="uint8", overwrite=True)


def test_the_export_says_what_makes_probabilities_and_its_loader_can_be_imported(tmp_path: Path) -> None:
    info, arrays = described(lifelike(SMALL["nfnet"], 3))
    info = dataclasses.replace(info, activation="sigmoid")
    options = ExportOptions(to="stablehlo", image_size=33)
    export_arrays("a test", info, arrays, tmp_path, name="1 my-net", options=options, overwrite=False)
    assert json.loads((tmp_path / "1 my-net.stablehlo.json").read_text())["output"]["activation"] == "sigmoid"
    code = "from _1_my_net_stablehlo import predict; import numpy; predict(numpy.zeros((1, 33, 33, 3), 'float32'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_activation(tmp_path: Path) -> None:
    function: ActivationName
    for function in ACTIVATIONS:
        config = NFResNetConfig(widths=(8,), depths=(1,), stem_width=4, activation=function)
        model = lifelike(config, 3)
        exported = network_for("it", *described(model), ExportOptions(to="onnx", image_size=8))
        facts = {"input": {"dtype": "float32", "shape": ["batch", 8, 8, 3]}}
        facts |= {"output": {"name": "logits", "shape": ["batch", 3]}}
        write_onnx(tmp_path, function, exported, ExportOptions(to="onnx"), facts)
        images = images_of(size=8) * 5
        wanted = np.asarray(model(jnp.asarray(images)))
        assert relative_difference(run_onnx(tmp_path / f"{function}.onnx", images), wanted) < 1e-5, function


def described(model: Classifier) -> tuple[weights.WeightsInfo, dict[str, np.ndarray]]:
    info = weights.WeightsInfo(model=model.config, num_classes=3, source="a test", parameters="raw")
    return info, arrays_of(model)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["nfnet_flax"] = None  # any import of it fails
sys.path.insert(0, sys.argv[1])
import numpy as np
from net_stablehlo import predict
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([predict(part) for part in np.split(images, [1, 4])]))
"""


def test_stablehlo_is_loaded_without_this_package(tmp_path: Path) -> None:
    model = lifelike(SMALL["se_resnext_d"], 3)
    written = nfnet_flax.export_model(save(tmp_path / "net.safetensors", model), tmp_path / "out", to="stablehlo")
    assert sorted(path.name for path in written.files) == [
        "net.stablehlo",
        "net.stablehlo.json",
        "net.stablehlo.npz",
        "net_stablehlo.py",
    ]
    lines = (tmp_path / "out" / "net_stablehlo.py").read_text().splitlines()
    assert sum(map(bool, lines)) == 10
    program = jax.export.deserialize(bytearray(written.path.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    images = images_of()
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "out")]
    command += [str(tmp_path / "images.npy"), str(tmp_path / "got.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert relative_difference(np.load(tmp_path / "got.npy"), outputs(model, images)) < 1e-5


def test_stablehlo_has_the_librarys_grouped_convolution_for_accelerators(tmp_path: Path) -> None:
    model = lifelike(SMALL["nf_regnet"], 3)
    path = save(tmp_path / "net.safetensors", model)
    written = nfnet_flax.export_model(path, tmp_path, to="stablehlo", input="uint8", dtype="float16")
    program = jax.export.deserialize(bytearray(written.path.read_bytes())).mlir_module()
    assert program.count("stablehlo.case") >= 1
    counts = {int(count) for count in re.findall(r"feature_group_count = (\d+)", program)}
    assert max(counts) == max(module.groups for _, module in nnx.iter_modules(model) if isinstance(module, WSConv)) > 1
    with np.load(f"{written.path}.npz") as stored:
        assert {str(value.dtype) for value in stored.values()} == {"float16"}


@pytest.mark.parametrize("family", ["timm_nfnet", "resnet", "efficientnet"])
def test_folded_weights_make_the_network(family: str, tmp_path: Path) -> None:
    model = lifelike(SMALL[family], 3)
    path = save(tmp_path / "net.safetensors", model)
    written = nfnet_flax.export_model(path, tmp_path, to="safetensors")
    assert written.path.name == "net.folded.safetensors"
    images = images_of(count=4)
    assert relative_difference(outputs(load_folded(written.path), images), outputs(model, images)) < 1e-5
    with pytest.raises(ConfigError, match="holds folded weights, which cannot be trained"):
        nfnet_flax.load_model(written.path)
    with pytest.raises(ConfigError, match="was not written by `nfnet export --to safetensors`"):
        load_folded(path)
    stored = weights.files.read_safetensors(written.path)[0]
    assert not any(name.endswith((".variance", ".mean", ".count")) for name in stored)
    assert not any(name.endswith(".gain") and "conv" in name for name in stored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(NFNetConfig):
    """A family from elsewhere."""

    def build(self, num_classes: int, rngs: nnx.Rngs) -> "OwnNet":
        return OwnNet(self, num_classes=num_classes, rngs=rngs)


class OwnNet(NFNet):
    """It might compute anything."""


def test_a_family_of_ones_own_is_exported_to_stablehlo(tmp_path: Path) -> None:
    path = save(tmp_path / "net.safetensors", lifelike(OwnConfig(widths=(8,), depths=(1,), group_width=4), 3))
    with pytest.raises(ConfigError, match=r"OwnNet is a family of your own.*export it to stablehlo"):
        nfnet_flax.export_model(path, tmp_path / "out", to="onnx")
    assert list((tmp_path / "out").iterdir()) == []
    assert nfnet_flax.export_model(path, tmp_path / "out", to="stablehlo").path.exists()


def test_an_export_that_differs_is_refused() -> None:
    model = lifelike(NFResNetConfig(widths=(8,), depths=(1,), stem_width=4), 3)
    options = ExportOptions(to="onnx", image_size=8)
    exported = network_for("it", *described(model), options)
    for wrong in (lambda x: outputs(model, x) * 1.001, lambda x: outputs(model, x) * np.nan):
        with pytest.raises(ConfigError, match=r"the export was removed; compared .* largest difference"):
            compare(wrong, exported, options, tolerance=1e-4, with_what="a test")
    with pytest.raises(ConfigError, match=r"results of shape \(4, 2\) where the network gives \(4, 3\)"):
        compare(lambda x: outputs(model, x)[:, 1:], exported, options, tolerance=1e-4, with_what="a test")


def test_what_float16_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    model = lifelike(NFResNetConfig(widths=(8,), depths=(1,), stem_width=4), 3)
    model.head.kernel[...] *= 1e6
    path = save(tmp_path / "net.safetensors", model)
    with pytest.raises(ConfigError, match="float16 may be too small for its values, export float32"):
        nfnet_flax.export_model(path, tmp_path / "out", to="onnx", image_size=8, dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []


def test_batch_norms_are_folded_once() -> None:
    model = lifelike(SMALL["resnet"], 3)
    folded = fold_batch_norms(model)
    again = fold_batch_norms(folded)
    images = images_of(count=2)
    assert np.array_equal(outputs(folded, images), outputs(again, images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "what to export: give either weights, or --workdir DIR"),
        (("{file}", "--workdir", "{out}"), "what to export: give either"),
        (("{file}", "--checkpoint", "best"), "choose weights of a run"),
        (("{out}.safetensors",), "cannot be read"),
        (("{unknown}",), "give the size; nfnet_f0 was published with images of 256 px"),
        (("{unknown}", "--image-size", "8", "--input", "uint8"), "record no mean and standard deviation of 3 channels"),
        (("{file}", "--image-size", "0"), "image_size = 0: must be at least 1"),
        (("{file}", "--to", "stablehlo", "--layout", "nchw"), "layout = 'nchw': is for ONNX"),
        (("{file}", "--to", "safetensors", "--input", "uint8"), "weights alone take no images"),
        (("{file}", "--name", "a/b"), "name = 'a/b': give the name of a file"),
        (("{file}", "--out", "{file}"), "is a file: give the folder"),
        (("{file}", "--name", "there"), "exists already"),
        (("{file}", "--to", "tensorrt"), "tensorrt"),
    ],
)
def test_bad_input_ends_with_code_2(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = NFResNetConfig(widths=(8,), depths=(1,), stem_width=4)
    places = {"file": tmp_path / "net.safetensors", "unknown": tmp_path / "f0.safetensors", "out": tmp_path / "out"}
    save(places["file"], lifelike(config, 3))
    info = weights.WeightsInfo(model=model_config("nfnet_f0"), num_classes=3, source="a test", parameters="raw")
    arrays = {f"a{number}": np.zeros(1, np.float32) for number in range(info.model.num_blocks)}
    weights.portable.write_weights(places["unknown"], info, arrays)
    places["out"].mkdir()
    (places["out"] / "there.onnx").write_text("kept")
    words = [word.format(**places) for word in options]
    words += [] if "--to" in words else ["--to", "onnx"]
    words += [] if "--out" in words else ["--out", str(places["out"])]
    try:
        code: object = cli.main(["export", *words])
    except SystemExit as stopped:  # tyro's own
        code = stopped.code
    printed = "".join(capsys.readouterr())
    assert code == exit_codes.EXIT_BAD_INPUT, printed
    assert "Traceback" not in printed
    assert message in " ".join(printed.replace("│", " ").split())
    assert [path.name for path in places["out"].iterdir()] == ["there.onnx"]
    assert (places["out"] / "there.onnx").read_text() == "kept"


def test_the_command_says_what_was_compared_and_replaces_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lifelike(NFResNetConfig(widths=(8,), depths=(1,), stem_width=4), 3)
    path = save(tmp_path / "net.safetensors", model)
    command = ["export", str(path), "--to", "onnx", "--out", str(tmp_path / "out"), "--image-size", "16"]
    assert cli.main(command) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    assert "onnx: compared with the trained network on random images, batches of 1 and 3, in onnxruntime" in printed
    assert f"written: {tmp_path / 'out' / 'net.onnx'}\n" in printed
    assert cli.main(command) == exit_codes.EXIT_BAD_INPUT
    assert cli.main([*command, "--overwrite"]) == exit_codes.EXIT_DONE
