"""Signal propagation: measured values against NumPy and the closed form, and the command with its files."""

import csv
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from nfnet_flax import cli
from nfnet_flax.config import ConfigError
from nfnet_flax.data.pipeline import open_split
from nfnet_flax.data.transforms import preprocess
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from nfnet_flax.models import Classifier, ModelConfig, NFNetConfig, NFResNetConfig, build_model
from nfnet_flax.models.classifier import BlockSpec
from nfnet_flax.models.folding import fold
from nfnet_flax.models.params import merge, split, update
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.telemetry.signal import SignalPropagation, expected_variances, signal_propagation, unit_noise
from nfnet_flax.training.reading import Run, preprocessing_of
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.weights import Preprocessing, save_weights
from tests import image_sets, runs
from tests.image_sets import image_file
from tests.networks import SMALL, lifelike
from tests.test_cli import fails

Arrays = dict[str, np.ndarray]


def initial(config: ModelConfig, seed: int = 0) -> Classifier:
    return build_model(config, num_classes=3, rngs=nnx.Rngs(seed))


# The network in NumPy, in float64, from the papers: no function of the package is used.


def np_convolution(p: Arrays, name: str, x: np.ndarray, stride: int = 1, groups: int = 1) -> np.ndarray:
    """Scaled weight standardization, and a convolution with SAME padding."""
    kernel = p[f"{name}.kernel"]
    fan_in = np.prod(kernel.shape[:3])
    centred = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = centred / np.sqrt(centred.var(axis=(0, 1, 2)) * fan_in) * p[f"{name}.gain"]
    window = kernel.shape[0]
    padding = []
    for size in x.shape[1:3]:
        total = max((math.ceil(size / stride) - 1) * stride + window - size, 0)
        padding.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (window, window), axis=(1, 2))[:, ::stride, ::stride]
    parts = zip(np.split(windows, groups, axis=3), np.split(kernel, groups, axis=3), strict=True)
    return np.concatenate([np.einsum("nhwiyx,yxio->nhwo", *part) for part in parts], axis=3) + p[f"{name}.bias"]


def np_gelu(x: np.ndarray) -> np.ndarray:
    return 1.7015043497085571 * 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def np_nfnet(config: NFNetConfig, p: Arrays, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """The output of the stem and of each block, and the end of each branch."""
    for index, stride in enumerate((2, 1, 1, 2)):
        x = np_convolution(p, f"stem.{index}", x if index == 0 else np_gelu(x), stride)
    found: list[tuple[np.ndarray, np.ndarray | None]] = [(x, None)]
    variance = 1.0
    for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        groups = int(width * config.expansion) // config.group_width
        for position in range(depth):
            name = f"stages.{stage}.{position}"
            h = np_gelu(x) / math.sqrt(variance)
            stride = 2 if position == 0 and stage > 0 else 1
            if position == 0:
                pooled = h if stride == 1 else (h[:, ::2] + h[:, 1::2])
                pooled = pooled if stride == 1 else (pooled[:, :, ::2] + pooled[:, :, 1::2]) / 4
                x, variance = np_convolution(p, f"{name}.conv_shortcut", pooled), 1.0
            h = np_convolution(p, f"{name}.conv0", h)
            h = np_convolution(p, f"{name}.conv1", np_gelu(h), stride, groups)
            h = np_convolution(p, f"{name}.conv1b", np_gelu(h), 1, groups)
            h = np_convolution(p, f"{name}.conv2", np_gelu(h))
            gate = h.mean(axis=(1, 2)) @ p[f"{name}.squeeze_excite.reduce.kernel"]
            gate = np.maximum(gate + p[f"{name}.squeeze_excite.reduce.bias"], 0)
            gate = gate @ p[f"{name}.squeeze_excite.expand.kernel"] + p[f"{name}.squeeze_excite.expand.bias"]
            branch = 2 * h / (1 + np.exp(-gate[:, None, None]))
            x = x + 0.2 * p[f"{name}.skip_gain"] * branch
            variance += 0.2**2
            found.append((x, branch))
    return found


def np_moments(x: np.ndarray) -> tuple[float, float]:
    rows = x.reshape(-1, x.shape[-1])
    return float(np.mean(rows.mean(axis=0) ** 2)), float(np.mean(rows.var(axis=0)))


def test_the_metrics_are_those_of_numpy() -> None:
    config = NFNetConfig(widths=(16, 32), depths=(2, 2), group_width=4, stochdepth_rate=0.5, drop_rate=0.5)
    model = lifelike(config, 3)
    model.train()  # neither dropout nor stochastic depth may be measured
    params = {name: np.asarray(value, np.float64) for name, value in split(model)[1].items()}
    images = 1 + 2 * unit_noise(3, 16, seed=5)
    found = signal_propagation(model, images)
    wanted = np_nfnet(config, params, images.astype(np.float64))
    assert np.std([np.var(branch) for _, branch in wanted[1:] if branch is not None]) > 0.1  # not all alike
    np.testing.assert_allclose((found.stem_sq_mean, found.stem_var), np_moments(wanted[0][0]), rtol=1e-4)
    assert [block.name for block in found.blocks] == [
        f"stages.{stage}.{position}" for stage in (0, 1) for position in (0, 1)
    ]
    for block, (output, branch) in zip(found.blocks, wanted[1:], strict=True):
        assert branch is not None
        np.testing.assert_allclose((block.avg_sq_mean, block.avg_var), np_moments(output), rtol=1e-4)
        np.testing.assert_allclose(block.res_avg_var, np_moments(branch)[1], rtol=1e-4)
        np.testing.assert_allclose(block.branch_factor, 0.2 * params[f"{block.name}.skip_gain"], rtol=1e-6)
    assert (found.num_images, found.image_size) == (3, (16, 16))
    assert found.batch_norm == "none"
    assert [block.expected_var for block in found.blocks] == pytest.approx([1.04, 1.08, 1.04, 1.08])
    np.testing.assert_allclose([block.beta**-2 for block in found.blocks], [1, 1.04, 1.08, 1.04])


@pytest.mark.parametrize("name", ["timm_nfnet", "efficientnet"])
def test_one_block_at_a_time_measures_what_the_whole_network_does(name: str) -> None:
    model = lifelike(SMALL[name], 3)
    images = unit_noise(4, 32)
    found = signal_propagation(model, images)
    graphdef, state = nnx.split(model)
    whole = jax.jit(lambda state, images: nnx.merge(graphdef, state).signal_statistics(images))(state, images)
    means, variances = [found.stem_sq_mean], [found.stem_var]
    np.testing.assert_allclose(means + [block.avg_sq_mean for block in found.blocks], whole["avg_sq_mean"], rtol=1e-4)
    np.testing.assert_allclose(variances + [block.avg_var for block in found.blocks], whole["avg_var"], rtol=1e-4)
    np.testing.assert_allclose([block.res_avg_var for block in found.blocks], whole["res_avg_var"], rtol=1e-4)
    has_norms = name == "efficientnet"
    assert found.batch_norm == ("running" if has_norms else "none")
    assert [block.expected_var is None for block in found.blocks] == [has_norms] * model.num_blocks


def test_a_wide_nf_resnet_follows_the_closed_form() -> None:
    model = initial(NFResNetConfig(widths=(128, 256), depths=(3, 2), stem_width=64, alpha=0.5))
    found = signal_propagation(model, unit_noise(8, 64), skip_gain=1.0)
    wanted = [1.25, 1.5, 1.75, 1.25, 1.5]
    assert expected_variances(model) == pytest.approx(wanted)
    assert [block.expected_var for block in found.blocks] == expected_variances(model)
    # Zeros at the borders, and a finite width, cost a few per cent; without alpha the variance would be 1 throughout.
    np.testing.assert_allclose([block.avg_var for block in found.blocks], wanted, rtol=0.06)
    np.testing.assert_allclose([block.res_avg_var for block in found.blocks], 1.0, rtol=0.2)
    assert max(block.avg_sq_mean for block in found.blocks) < 0.02


def test_skip_gains_of_zero_hide_the_branches_and_a_given_value_shows_them() -> None:
    model = initial(NFNetConfig(widths=(128,), depths=(3,), group_width=32))
    before = split(model)[1]
    images = unit_noise(4, 32)
    own = signal_propagation(model, images)
    assert [block.branch_factor for block in own.blocks] == [0, 0, 0]
    assert len({block.avg_var for block in own.blocks}) == 1
    assert min(block.res_avg_var for block in own.blocks) > 0.3  # before the skip gain
    ones = signal_propagation(model, images, skip_gain=1.0)
    grown = np.diff([block.avg_var for block in ones.blocks])
    np.testing.assert_allclose(grown, [0.04 * block.res_avg_var for block in ones.blocks[1:]], rtol=0.1)
    after = split(model)[1]
    assert all(np.array_equal(before[name], after[name]) for name in before)  # the network itself is unchanged
    assert not model.deterministic
    update(model, {name: np.ones((), np.float32) for name in before if name.endswith("skip_gain")})
    assert signal_propagation(model, images) == ones


def test_timms_networks_have_gains_in_place_of_skip_gains() -> None:
    model = initial(SMALL["timm_nfnet"])
    images = unit_noise(4, 32)
    assert {block.res_avg_var for block in signal_propagation(model, images).blocks} == {0.0}
    found = signal_propagation(model, images, skip_gain=1.0)
    assert min(block.res_avg_var for block in found.blocks) > 0.05
    assert [block.branch_factor for block in found.blocks] == [0.2] * 3


def test_batch_norm_at_initialisation_uses_the_images() -> None:
    model = lifelike(SMALL["se_resnext_d"], 3)
    update(model, {name: np.zeros((), np.int32) for name in split(model)[2] if name.endswith("count")})
    images = 7 + unit_noise(4, 32)
    found = signal_propagation(model, images)
    assert found.batch_norm == "batch"
    model.train()
    graphdef, state = nnx.split(model)
    whole = jax.jit(lambda state, images: nnx.merge(graphdef, state).signal_statistics(images))(state, images)
    np.testing.assert_allclose([block.avg_var for block in found.blocks], whole["avg_var"][1:], rtol=1e-3)
    np.testing.assert_allclose([block.res_avg_var for block in found.blocks], whole["res_avg_var"], rtol=1e-3)
    assert not any(int(value) for name, value in split(model)[2].items() if name.endswith("count"))  # it is unchanged


class Odd(nnx.Module):
    """A block that uses its place in the network while it is traced."""

    def __call__(self, x: jax.Array, keys: None, spec: BlockSpec) -> tuple[jax.Array, jax.Array]:
        branch = -x if spec.index > 1 and spec.drop_path_rate > 0 else x
        return x + branch, branch


def test_a_block_may_look_at_its_place() -> None:
    model = lifelike(SMALL["nf_resnet"], 3)
    for stage in model.stages:
        for position in range(len(stage)):
            stage[position] = Odd()
    found = signal_propagation(model, unit_noise(2, 16))
    np.testing.assert_allclose(
        [block.avg_var for block in found.blocks], np.array([4, 16, 0]) * found.stem_var, rtol=1e-5
    )
    assert {block.expected_var for block in found.blocks} == {None}


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    model = lifelike(SMALL["nf_resnet"], 3)
    with pytest.raises(ConfigError, match="the network is folded: give it as create_model"):
        signal_propagation(fold(model), unit_noise(1, 16))
    with pytest.raises(ConfigError, match=r"skip_gain = 1.0: the network has no skip gains"):
        signal_propagation(lifelike(SMALL["resnet"], 3), unit_noise(1, 16), skip_gain=1.0)
    with pytest.raises(ConfigError, match="skip_gain = inf: must be finite"):
        signal_propagation(model, unit_noise(1, 16), skip_gain=math.inf)
    with pytest.raises(ConfigError, match=r"images.shape = \(1, 16, 16, 1\): give a jax.Array of"):
        signal_propagation(model, unit_noise(1, 16, channels=1))
    with pytest.raises(ConfigError, match="image_size = 0: must be at least 1"):
        unit_noise(1, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the real command."""
    workdir = tmp_path_factory.mktemp("signal") / "run"
    words = runs.command(workdir, "--num-steps=4", "--eval-every-steps=4", "--checkpoint.every-steps=4", "--seed=3")
    assert cli.main(words[words.index("train") :]) == EXIT_DONE
    return workdir


def printed_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["signal", *argv, "--json", "-"]) == EXIT_DONE
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def check_series(series: dict[str, Any], wanted: SignalPropagation) -> None:
    """Compares what was printed with what a network's signal is."""
    stem, *blocks = series["blocks"]
    assert stem["block"] == "stem"
    np.testing.assert_allclose(
        [stem["avg_sq_mean"], stem["avg_var"]], [wanted.stem_sq_mean, wanted.stem_var], rtol=1e-5
    )
    assert [block["block"] for block in blocks] == [block.name for block in wanted.blocks]
    for name in ("avg_sq_mean", "avg_var", "res_avg_var", "expected_var", "branch_factor", "beta"):
        got, want = [block[name] for block in blocks], [getattr(block, name) for block in wanted.blocks]
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)


def test_a_run_is_shown_beside_its_beginning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed_json(
        capsys, str(run), "--held-out", "--batch-size=5", "--skip-gain=own", "--parameters=raw", "--checkpoint=4"
    )
    opened = Run(run)
    recipe = opened.recipe
    assert recipe.seed == 3
    source = open_split(recipe.data, "eval", opened.class_names)
    seen_as = dataclasses.asdict(preprocessing_of(recipe.data))
    images = preprocess([source[index]["image"] for index in range(5)], **seen_as)
    assert (found["num_images"], found["image_size"]) == (5, [16, 16])
    random, trained = found["series"]
    assert random["parameters"] == "random parameters, seed 3"
    assert trained["parameters"] == "run 'digits', step 4, seed 3, raw parameters"
    check_series(trained, signal_propagation(opened.model("raw"), images))
    structure = model_structure(recipe.model, recipe.num_classes)
    begun = create_state(structure, 3, optax.sgd(0.0), make_mesh(jax.devices()[:1]))
    first = merge(structure.graphdef, begun.params, begun.batch_stats)
    check_series(random, signal_propagation(first, images))
    assert random["blocks"][1] != trained["blocks"][1]


def test_a_weight_file_on_given_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The EMA of a run would do the same; these weights are far from their beginning."""
    seen_as = Preprocessing(
        image_size=32, crop_margin=0, resampler="pillow_bicubic", mean=(120.0, 110.0, 100.0), std=(60.0, 61.0, 62.0)
    )
    model = lifelike(SMALL["nfnet"], 3)
    path = str(tmp_path / "some.safetensors")
    save_weights(path, model, source="a test", parameters="unknown", preprocessing=seen_as)
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.png").write_bytes(image_file(seed, "PNG"))
    found = printed_json(capsys, path, "--images", str(folder), "--image-size", "24")
    images = preprocess(
        [image_file(seed, "PNG") for seed in range(4)],
        **dataclasses.asdict(dataclasses.replace(seen_as, image_size=24)),
    )
    assert found["input"] == f"4 images of 24 x 24 px of {folder}"
    assert [series["parameters"] for series in found["series"]] == ["random parameters, seed 0, skip gains 1", "a test"]
    check_series(found["series"][1], signal_propagation(model, images))
    (folder / "4.png").write_bytes(b"no image")
    said = fails(capsys, "signal", path, "--images", str(folder))
    assert f"images = '{folder}/4.png': " in said


def points(svg: bytes) -> list[np.ndarray]:
    """The lines of a picture, (N, 2) each, in the order in which they are drawn."""
    paths = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
    found = [re.findall(r"[ML] ([-\d.e]+) ([-\d.e]+)", path.get("d", "")) for path in paths if path.get("clip-path")]
    return [np.asarray(each, float) for each in found]


def test_the_table_the_files_and_the_picture_show_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "test_nfnet"
    files = {form: tmp_path / f"signal.{form}" for form in ("svg", "csv", "json")}
    words = ["signal", model, "--image-size", "32", "--batch-size", "4", "--seed", "1"]
    asked = ["--out", str(files["svg"]), "--csv", str(files["csv"]), "--json", str(files["json"])]
    assert cli.main([*words, *asked]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"network: {model}", "input: unit Gaussian noise, seed 1, 4 images of 32 x 32 px", ""]
    assert lines[3] == "random parameters, seed 1, skip gains 1:"
    assert lines[-3:] == [f"{form}: {files[name]}" for form, name in (("out", "svg"), ("csv", "csv"), ("json", "json"))]
    assert lines[-4].startswith("Shortcuts between stages average 2 x 2 places")
    rows = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    blocks = json.loads(files["json"].read_text())["series"][0]["blocks"]
    assert [row["block"] for row in rows] == ["stem", *(f"stages.{stage}.0" for stage in range(4))]
    names = ("beta", "avg_sq_mean", "avg_var", "expected_var", "res_avg_var", "branch_factor")
    for line, row, block in zip(lines[5:], rows, blocks, strict=False):
        assert [float(row[name]) if row[name] else None for name in names] == [block[name] for name in names]
        shown = ["-" if block[name] is None else f"{block[name]:.4g}" for name in names]
        assert line.split() == [row["block"], *shown]
    # In the picture, heights are the numbers, except for a factor and a shift for each panel, or their logarithms.
    drawn = points(files["svg"].read_bytes())
    for name, skipped in (("avg_sq_mean", 0), ("avg_var", 0), ("res_avg_var", 1)):
        values = np.array([float(row[name]) for row in rows[skipped:]])
        heights = [line[:, 1] for line in drawn if len(line) == len(values) and np.ptp(line[:, 1]) > 0]
        fits = [abs(np.corrcoef(shape, height)[0, 1]) for height in heights for shape in (values, np.log(values))]
        assert max(fits) > 0.99999, name
    again = tmp_path / "again.svg"
    assert cli.main([*words, "--out", str(again)]) == EXIT_DONE
    assert again.read_bytes() == files["svg"].read_bytes()


def test_a_signal_that_is_not_finite_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lifelike(SMALL["nf_resnet"], 3)
    update(model, {"stages.1.0.conv0.bias": np.full((8,), 3e38, np.float32)})  # more than float32 has, times gamma
    save_weights(tmp_path / "bad.safetensors", model, source="a test", parameters="unknown")
    words = [str(tmp_path / "bad.safetensors"), "--image-size=16", "--batch-size=2", "--out", str(tmp_path / "bad.png")]
    assert cli.main(["signal", *words]) == EXIT_DONE
    assert "not finite from stages.1.0 on" in capsys.readouterr().out
    with Image.open(tmp_path / "bad.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("L").getcolors() or ()) > 10  # not empty
    blocks = printed_json(capsys, *words, "--overwrite")["series"][1]["blocks"]
    assert [block["avg_var"] is None for block in blocks] == [False, False, True, True]


def test_what_the_command_cannot_do_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.csv").touch()
    save_weights("plain.safetensors", lifelike(SMALL["resnet"], 3), source="a test", parameters="unknown")
    for words, message in (
        (["nfnet_f9"], "unknown model 'nfnet_f9': known are nfnet_f"),
        (
            ["gone/run"],
            "network = 'gone/run': there is no such file or folder: give a weight file, the folder of a run",
        ),
        (["plain.safetensors", "--image-size=16", "--skip-gain=1"], "skip_gain = 1.0: this network has no skip gains"),
        (["plain.safetensors"], "says nothing about its images: write a weight file with a Preprocessing"),
        (["plain.safetensors"], "or give --image-size"),
        (["nfnet_f0", "--out=f0.pdf"], "give a name that ends in .png or .svg"),
        (["nfnet_f0", "--csv=there.csv"], "csv = 'there.csv': exists already"),
        (["nfnet_f0", "--csv=-", "--json=-"], "only one of them can be the standard output"),
        (["nfnet_f0", "--csv=a.svg", "--out=a.svg"], "two of them are the same file"),
        (["nfnet_f0", "--held-out"], "held_out = True: is for a run"),
        (["nfnet_f0", "--held-out", "--images=."], "held_out = True: leave --images out"),
        (["nfnet_f0", "--checkpoint=best"], "checkpoint = 'best': is for a run: leave it out"),
        (["nfnet_f0", "--parameters=raw"], "parameters = 'raw': is for a run: leave it out"),
        (["nfnet_f0", "--batch-size=0"], "batch_size = 0: must be at least 1"),
        (["nfnet_f0", "--batch-size=1000000000"], "batch_size = 1000000000: 1,000,000,000 images of 192 px take"),
        (["nfnet_f0", "--seed=-1"], "seed = -1: must lie in"),
    ):
        assert message in fails(capsys, "signal", *words)
    assert {path.name for path in tmp_path.iterdir()} == {"there.csv", "plain.safetensors"}


WITHOUT_MATPLOTLIB = (
    image_sets.WITHOUT_TENSORFLOW.replace("tensorflow", "matplotlib")
    + """
from nfnet_flax import cli
sys.exit(cli.main(sys.argv[1:]))
"""
)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_MATPLOTLIB, "signal", "nfnet_f0", "--out", str(tmp_path / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == EXIT_BAD_INPUT
    assert "a.png': pip install 'nfnet_flax[plots]' (Matplotlib)" in done.stderr
    assert "Traceback" not in done.stderr
