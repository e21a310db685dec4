"""Weight files as users meet them: renamed by wrappers, cut short, of another network, about to be overwritten."""

import json
import os
import pickle
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nfnet_flax import weights
from nfnet_flax.config import ConfigError
from nfnet_flax.models import Classifier, NFNetConfig, build_model
from nfnet_flax.weights.entries import HostArrays, arrays_of
from tests import golden
from tests.networks import SMALL

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


def small(seed: int) -> Classifier:
    return build_model(SMALL["nfnet"], num_classes=3, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def model() -> Classifier:
    return small(1)


@pytest.fixture(scope="module")
def other() -> Classifier:
    """The same network; tests replace its arrays."""
    return small(2)


def same(a: HostArrays, b: HostArrays) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_many_problems_are_counted_by_layer(model: Classifier, other: Classifier) -> None:
    tensors = weights.to_timm(model)
    before = arrays_of(other)
    with pytest.raises(ConfigError) as refused:
        weights.from_timm(other, {f"layer{name}": value for name, value in tensors.items()})
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    num_in_stages = sum(name.startswith("stages.") for name in tensors)
    counts = f"{len(tensors)} (stages {num_in_stages}, stem 12, final_conv 3, head 2), such as final_conv."
    assert lines[1].startswith(f"  missing: {counts}")
    assert lines[2].startswith(f"  unexpected: {len(tensors)} (layerstages {num_in_stages}, layerstem 12, ")
    assert same(arrays_of(other), before)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module.", "state_dict.model."]
)
def test_prefixes_of_wrappers_are_taken_off(model: Classifier, other: Classifier, prefix: str) -> None:
    weights.from_timm(other, {f"{prefix}{name}": value * 0 for name, value in weights.to_timm(model).items()})
    assert not any(np.any(value) for value in arrays_of(other).values())
    weights.from_timm(other, {f"{prefix}{name}": value for name, value in weights.to_timm(model).items()})
    assert same(arrays_of(other), arrays_of(model))


def test_parts_of_checkpoints_and_wrapped_layers(model: Classifier) -> None:
    tensors = weights.to_timm(model)
    with pytest.raises(ConfigError, match=r"other dicts, under 'state_dict': .* checkpoint\['state_dict'\]"):
        weights.from_timm(model, {"epoch": 3, "state_dict": tensors})
    inside = {name.replace("stages.0.0.", "stages.0.0._orig_mod."): value for name, value in tensors.items()}
    averaged = {"n_averaged": np.asarray(7)} | {f"module.{name}": value for name, value in inside.items()}
    copy = small(3)
    weights.from_timm(copy, averaged)
    assert same(arrays_of(copy), arrays_of(model))


def test_patterns_that_leave_nothing_to_load(model: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights.save_weights(path, model, source="a test", parameters="raw")
    for skip in (("*",), ("head.*", "st*", "final_conv.*")):
        with pytest.raises(ConfigError, match=r"skip: the patterns '.*' leave out all \d+ parameters"):
            weights.load_weights(model, path, skip=skip)


def test_a_file_makes_its_own_network(model: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights.save_weights(path, model, source="a test", parameters="raw")
    with pytest.raises(ConfigError, match=r"(?s)widths.*depths.*nfnet_flax\.load_model\(file\)"):
        weights.create_model("nfnet_f0", rngs=nnx.Rngs(0), num_classes=3, weights=path)
    with pytest.raises(ConfigError, match="family: NFNetConfig -> ResNetConfig"):
        weights.create_model("resnet50", rngs=nnx.Rngs(0), num_classes=3, weights=path)
    loaded = weights.load_model(path)
    assert loaded.deterministic
    assert (loaded.config, loaded.num_classes) == (SMALL["nfnet"], 3)
    assert same(arrays_of(loaded), arrays_of(model))


def test_a_file_of_an_earlier_version_is_read() -> None:
    path = golden.FOLDER / "weights_with_image_sizes.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert '"train_image_size": 24' in file.metadata()["model"]
    model = weights.load_model(path)
    assert model.config == NFNetConfig(widths=(8,), depths=(1,), group_width=4)
    stored = load_file(path)
    for name, value in arrays_of(model).items():
        np.testing.assert_array_equal(value, stored[name])


def test_a_file_says_what_its_outputs_and_images_are(model: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    preprocessing = weights.Preprocessing(
        image_size=32, crop_margin=4, resampler="pillow_bicubic", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0)
    )
    names = ("ant", "bee", "ch\u00e2teau")
    about = {"source": "a test", "preprocessing": preprocessing}
    weights.save_weights(path, model, parameters="raw", class_names=names, **about)  # type: ignore[arg-type]
    info, _ = weights.read_weights(path)
    assert (info.class_names, info.preprocessing) == (names, preprocessing)
    for wrong in (("ant",) * 3, ("ant", "bee", "cat", "dog")):
        with pytest.raises(ConfigError, match=r"class_names = .* must not be more than num_classes = 3"):
            weights.save_weights(path, model, source="a test", parameters="raw", class_names=wrong)


def test_nothing_is_overwritten_silently(model: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    old = os.umask(0o027)
    try:
        weights.save_weights(path, model, source="the first", parameters="raw")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ConfigError, match=r"exists already: .*--overwrite, in Python overwrite=True"):
        weights.save_weights(path, model, source="the second", parameters="raw")
    assert weights.read_weights(path)[0].source == "the first"
    weights.save_weights(path, model, source="the third", parameters="raw", overwrite=True)
    assert weights.read_weights(path)[0].source == "the third"
    with pytest.raises(ConfigError, match="cannot be written"):
        weights.save_weights(path / "below" / "w.safetensors", model, source="", parameters="raw")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ConfigError, match=r"weights file = 's3://bucket/w.safetensors': is a URL"):
        weights.save_weights("s3://bucket/w.safetensors", model, source="", parameters="raw")


@pytest.mark.parametrize("first_byte", [0x80, 0x20])  # as those of a pickle, and a space
def test_a_part_of_a_file_is_incomplete_whatever_its_length_looks_like(
    model: Classifier, tmp_path: Path, first_byte: int
) -> None:
    path = tmp_path / "weights.safetensors"
    for length in range(0, 300, 8):  # of a text in the header, whose own length stands in the first byte
        weights.save_weights(path, model, source="a" * length, parameters="raw", overwrite=True)
        whole = path.read_bytes()
        if whole[0] == first_byte:
            break
    assert whole[0] == first_byte
    weights.read_weights(path)
    for size in (5, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"is incomplete.*copy it again"):
            weights.read_weights(path)


def test_what_a_wrong_file_is_instead(model: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights.save_weights(path, model, source="a test", parameters="raw")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cases = {
        whole[:-10]: rf"is incomplete \({len(whole) - 10} of {len(whole)} bytes\)",
        whole[: header - 10]: r"is incomplete \(its \d+ bytes end within the header\)",
        whole[:5]: "is incomplete",
        b"": "is empty",
        whole + b"0": "is damaged",
        whole[:8] + b"?" + whole[9:]: "is damaged",
        LFS_POINTER: "is a Git LFS pointer, .*`git lfs pull`",
        b"<!DOCTYPE html>\n<html>Not found</html>": "is a web page",
        b"PK\x03\x04" + bytes(100): "is a zip archive",
        pickle.dumps({"a": np.zeros(3)}): "is a pickle",
        bytes(range(200, 240)): r"is no \.safetensors file",
    }
    for content, reason in cases.items():
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"weights file '.*' {reason}"):
            weights.read_weights(path)
    with pytest.raises(ConfigError, match=r"is a folder: .*`nfnet convert run`"):
        weights.read_weights(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        weights.read_weights(tmp_path / "absent")
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ConfigError, match="nfnet convert"):
        weights.read_weights(path)
    save_file({"a": np.zeros(3, jnp.float8_e4m3fn.dtype)}, path)
    with pytest.raises(ConfigError, match="a is of type F8_E4M3"):
        weights.read_weights(path)
    path.write_bytes(LFS_POINTER)
    with pytest.raises(ConfigError, match="refused: it is a Git LFS pointer"):
        weights.load_haiku_file(path)


def test_wrong_metadata_are_named(model: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights.save_weights(path, model, source="a test", parameters="raw")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    config = json.loads(metadata["model"])
    cases = {
        "metadata lack 'num_classes'": {name: text for name, text in metadata.items() if name != "num_classes"},
        "metadata are wrong: invalid literal": metadata | {"num_classes": "three"},
        "num_classes = -1: must not be negative": metadata | {"num_classes": "-1"},
        "a head of 0 classes, not 3": metadata | {"num_classes": "0"},
        "metadata are wrong: Expecting value": metadata | {"model": ""},
        "unknown type 'list'": metadata | {"model": json.dumps({"type": "list"})},
        "metadata are wrong: model = [1, 2]": metadata | {"model": "[1, 2]"},
        "written by another version": metadata | {"model": json.dumps(config | {"new_field": 1})},
        "name 1000000003 blocks": metadata | {"model": json.dumps(config | {"depths": [10**9, 3]})},
        "WeightsInfo.parameters = 'best'": metadata | {"parameters": "best"},
        "must not be more than num_classes": metadata | {"class_names": '["a", "b", "c", "d"]'},
        "a head of 10 classes, not 3": metadata | {"num_classes": "10"},
    }
    for reason, wrong in cases.items():
        save_file(arrays, path, wrong)
        with pytest.raises(ConfigError, match=re.escape(reason)):
            weights.load_weights(model, path)
    with pytest.raises(ConfigError, match=r"misshaped: head\.kernel is \(128, 3\), expected \(128, 10\)"):
        weights.load_model(path)
