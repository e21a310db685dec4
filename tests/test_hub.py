"""Weights in a model hub: a run's folder for it, and a stand-in hub on this machine that gives them back."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nfnet_flax import Run, cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.models import model_config
from nfnet_flax.paths import hub_name
from nfnet_flax.weights import open_weights
from nfnet_flax.weights.portable import Preprocessing, read_weights
from nfnet_flax.weights.timm_folder import architecture_of, architectures, info_of
from tests import runs

NAME = "timm/mine.digits"
COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """Answers as a hub does for the files of repositories in `root`."""

    root: Path

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def _answer(self, *, has_body: bool) -> None:
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/main/([\w.-]+)", self.path)
        file = self.root / found[1] / found[2] if found else self.root / "none"
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if file.parent.is_dir() and found else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """Address of a hub for the repositories in a folder."""
    handler = type("HubOf", (Hub,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one of timm's networks on the digits."""
    folder = tmp_path_factory.mktemp("hub")
    recipe = runs.recipe_with("model_config('test_nfnet')", folder)
    options = ("--num-steps=4", "--eval-every-steps=4", "--checkpoint.every-steps=4", *runs.FEW_IMAGES)
    printed = runs.finish(runs.start(folder / "run", *options, "--data.eval-crop-margin=2", recipe=recipe))
    assert (folder / "run" / "checkpoints" / "4").exists(), printed
    return folder / "run"


@pytest.fixture(scope="module")
def repositories(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a hub with the weights of the run."""
    root = tmp_path_factory.mktemp("repositories")
    assert cli.main(["convert", "run", str(run), "--to", "hub-folder", "--out", str(root / NAME)]) == 0
    return root


def nfnet(*words: str, cache: Path, endpoint: str, **environment: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-m", "nfnet_flax.cli", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: "subprocess.Popen[str]") -> tuple[int, str]:
    printed = process.communicate(timeout=120)[0]
    return process.returncode, printed


def test_a_folder_for_a_hub_holds_the_run(run: Path, repositories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = repositories / NAME
    info, arrays = open_weights(folder)
    wanted = Run(run).weights("ema")
    assert arrays.keys() == wanted.keys()
    assert all(np.array_equal(arrays[name], value) for name, value in wanted.items())
    assert info.model == Run(run).recipe.model
    assert info.class_names == Run(run).class_names
    assert info.preprocessing is not None
    assert (info.preprocessing.image_size, info.preprocessing.crop_margin) == (16, 2)
    assert "step 4" in info.source
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_nfnet"
    assert config["label_names"] == list(info.class_names)
    assert (config["pretrained_cfg"]["crop_mode"], config["pretrained_cfg"]["input_size"]) == ("squash", [3, 16, 16])
    assert int(16 / config["pretrained_cfg"]["crop_pct"]) == 18
    assert {name for name in load_file(folder / "model.safetensors") if name.startswith("head.")} == {
        "head.fc.weight",
        "head.fc.bias",
    }
    card = (folder / "README.md").read_text()
    accuracy = Run(run).metrics()[-1]["eval_ema/top1"]
    for text in (
        "library_name: timm",
        "`test_nfnet`",
        "after 4 updates of 16 images",
        f"| held-out top-1 | {accuracy:.2%} |",
    ):
        assert text in card
    assert cli.main(["convert", "run", str(run), "--to", "hub-folder", "--out", str(folder)]) == 2
    assert "holds model.safetensors already" in capsys.readouterr().err


def test_a_name_in_a_hub_is_fetched_once_and_checked(run: Path, repositories: Path, tmp_path: Path) -> None:
    cache, nowhere = tmp_path / "cache", "http://127.0.0.1:9"
    unreachable = nfnet("convert", "timm", NAME, "--out", str(tmp_path / "x"), cache=tmp_path / "x", endpoint=nowhere)
    with serving(repositories) as endpoint:
        code, printed = finished(nfnet("convert", "timm", NAME, "--out", str(tmp_path), cache=cache, endpoint=endpoint))
        assert code == 0, printed
        code, printed = finished(nfnet("convert", "timm", "timm/other", "--out", "x", cache=cache, endpoint=endpoint))
        assert (code, "the hub has no repository 'timm/other'" in printed) == (2, True), printed
    info, arrays = read_weights(tmp_path / "test_nfnet.safetensors")
    digest = hashlib.sha256((repositories / NAME / "model.safetensors").read_bytes()).hexdigest()
    assert info.source == f"{NAME}, revision {COMMIT[:12]}, SHA-256 {digest}"
    assert info.parameters == "ema"
    assert info.class_names == Run(run).class_names
    assert all(np.array_equal(arrays[name], value) for name, value in Run(run).weights("ema").items())

    def offline(*words: str) -> tuple[int, str]:
        return finished(nfnet(*words, cache=cache, endpoint=nowhere, HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu"))

    small = [word for option in runs.FEW_IMAGES for word in option.split("=")]
    recipe = runs.recipe_with("model_config('test_nfnet')", tmp_path)
    code, printed = offline(
        *("train", str(recipe), "--workdir", str(tmp_path / "tuned"), "--init-from", f"{NAME}@main"),
        *("--num-steps", "1", "--no-tensorboard", *small),
    )
    assert code == 0, printed
    assert Run(tmp_path / "tuned").recipe.init_from == f"{NAME}@main"
    code, printed = offline("convert", "timm", "hf-hub:someone/else", "--out", "x")
    assert (code, "HF_HUB_OFFLINE forbids" in printed) == (2, True), printed
    (blob,) = {path.resolve() for path in cache.glob("hub/*/snapshots/*/model.safetensors")}
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    code, printed = offline("convert", "timm", NAME, "--out", str(tmp_path / "again"))
    assert (code, "is damaged: its checksum differs from its name" in printed) == (2, True), printed
    code, printed = finished(unreachable)
    assert (code, "cannot be fetched" in printed) == (exit_codes.EXIT_INPUT_FAILED, True), printed


TIMMS: dict[str, Any] = {
    "architecture": "eca_nfnet_l0",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "ra2_in1k",
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "test_crop_pct": 1.0,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}
"""What timm writes for its own weights, without fields that are not read."""


def test_preprocessing_and_classes_are_those_of_timms_configuration() -> None:
    info = info_of(TIMMS, "a test")
    assert info.model == model_config("eca_nfnet_l0")
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    assert info.preprocessing == Preprocessing(
        image_size=288, crop_margin=0, resampler="pillow_bicubic", mean=mean, std=std, keeps_aspect=True
    )
    assert info.class_names is not None
    assert (info.class_names[0], info.class_names[-1]) == ("n01440764", "n15075141")
    squashed = {"input_size": [3, 192, 192], "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"}
    squashed |= {"mean": [0.5], "std": [0.5]}
    info = info_of(
        {"architecture": "dm_nfnet_f0", "num_classes": 3, "pretrained_cfg": squashed, "label_names": list("abc")}, ""
    )
    assert (info.model, info.class_names) == (model_config("nfnet_f0"), ("a", "b", "c"))
    assert info.preprocessing == Preprocessing(
        image_size=192, crop_margin=21, resampler="pillow_bilinear", mean=(127.5,) * 3, std=(127.5,) * 3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet50"}, "architecture = 'resnet50': is none of timm's normalizer-free networks"),
        ({"model_args": {"depths": [1, 1]}}, r"model_args = {'depths': \[1, 1\]}: change the network"),
        ({"pretrained_cfg": TIMMS["pretrained_cfg"] | {"crop_mode": "border"}}, "crop_mode = 'border'"),
        ({"pretrained_cfg": TIMMS["pretrained_cfg"] | {"interpolation": "lanczos"}}, "interpolation = 'lanczos'"),
    ],
)
def test_what_a_configuration_asks_and_is_not_known_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        info_of(TIMMS | change, "a test")


def test_networks_that_timm_lacks_are_not_written_for_it() -> None:
    for theirs, ours in architectures().items():
        assert architecture_of(model_config(ours, drop_rate=0.3, in_channels=1)) == theirs
    for name in ("nf_resnet50", "nfnet_f0+", "efficientnet_b0"):
        with pytest.raises(ConfigError, match="timm has no network of this form"):
            architecture_of(model_config(name))


def test_names_in_a_hub_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(hub_name("timm/a.b_in1k")) == "timm/a.b_in1k"
    assert str(hub_name("hf-hub:me/mine@v1")) == "hf-hub:me/mine@v1"
    for path in ("runs/digits", "timm/a.safetensors", "./timm/a", "timm/a/b", "timm", "/timm/a"):
        assert hub_name(path) is None
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "a.b_in1k").mkdir()
    assert hub_name("timm/a.b_in1k") is None
