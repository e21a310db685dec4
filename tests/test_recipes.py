"""Every recipe with every variant; arguments of recipes; what the baselines need of the optimizer; one debug run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.source_config import ArrayRecordSource, SyntheticSource
from nfnet_flax.debug import debug_recipe
from nfnet_flax.imagenet import RESNET_OPTIM, imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, EfficientNetConfig, ImageSizes, NFNetConfig, NFResNetConfig, model_config
from nfnet_flax.models.registry import PUBLISHED_TOP1_PERCENT, VARIANTS
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import AGC, Cosine, ExponentialDecay, Muon, OptimConfig, RMSProp, make_optimizer, make_schedule
from nfnet_flax.parallel.reduce import FastSum, OrderedSum
from nfnet_flax.recipe import Recipe, read_recipe, save_recipe
from nfnet_flax.recipe_file import load_recipe
from tests.image_sets import config_of
from tests.runs import ROOT

RECIPES = ROOT / "recipes"
# Of arXiv 2102.06171, 2101.08692 and 1905.11946 and the code published with them:
# variants, batch size, epochs, peak learning rate, AGC, layers and magnitudes of RandAugment, whether images are mixed.
PUBLISHED: dict[str, tuple[list[str], int, float, float, float | None, list[tuple[int, int] | None], bool]] = {
    "nfnet": (
        [f"f{level}{suffix}" for suffix in ("", "+") for level in range(8)],
        4096,
        360,
        1.6,
        0.01,
        [(4, 5), (4, 10), (4, 10), (4, 15), (4, 15), (4, 15), (4, 15), (4, 15)] * 2,
        True,
    ),
    "nf_regnet": ([f"b{level}" for level in range(9)], 1024, 360, 0.4, None, [None] * 9, True),
    "nf_resnet": (["50", "101", "152", "200", "288", "600"], 1024, 90, 0.4, None, [None] * 6, False),
    "resnet": (["50", "101", "152", "200", "se_resnext_d50"], 1024, 90, 0.4, None, [None] * 5, False),
    "efficientnet": ([f"b{level}" for level in range(8)], 4096, 350, 0.256, None, [(2, 10)] * 8, False),
}
ALL = [(family, variant) for family, row in PUBLISHED.items() for variant in row[0]]


def load(family: str, variant: str) -> Recipe:
    return load_recipe(f"{RECIPES / family}_imagenet.py:variant={variant}")


def test_there_is_a_row_here_for_every_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == {
        "digits",
        "finetune",
        *(f"{family}_imagenet" for family in PUBLISHED),
    }


@pytest.mark.parametrize(("family", "variant"), ALL)
def test_a_recipe_is_the_published_one(family: str, variant: str, tmp_path: Path) -> None:
    variants, batch_size, num_epochs, peak, clipping, augmentations, is_mixed = PUBLISHED[family]
    recipe = load(family, variant)
    data, sizes = recipe.data, IMAGE_SIZES[recipe.name]
    found = None if data.randaugment is None else (data.randaugment.num_layers, data.randaugment.magnitude)
    assert found == augmentations[variants.index(variant)]
    assert (data.batch_size, recipe.num_epochs) == (batch_size, num_epochs)
    assert recipe.optim.clipping == (None if clipping is None else AGC(ratio=clipping))
    assert recipe.optim.peak_learning_rate(batch_size) == pytest.approx(peak)
    assert (data.mixing is not None) == is_mixed
    assert isinstance(data.source, ArrayRecordSource)
    assert data.augment == CropAugment()
    assert (data.image_size, data.eval_image_size) == (sizes.train, sizes.test)
    assert (recipe.num_classes, recipe.objective, data.eval_crop_margin, data.num_held_out) == (
        1000,
        SoftmaxCrossEntropy(label_smoothing=0.1),
        32,
        None,
    )
    assert recipe.total_steps(1_281_167) == round(num_epochs * 1_281_167 / batch_size)
    assert recipe.name in VARIANTS
    save_recipe(recipe, tmp_path / "recipe.json")
    assert read_recipe(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_images_may_be_in_another_folder_and_form(family: str, sets: Path) -> None:
    for kind in ("array_record", "folder", "parquet", "webdataset"):
        source = load_recipe(f"{RECIPES / family}_imagenet.py:data={sets / kind}").data.source
        assert len(source.open("train", 0)) == 12
        assert type(source) is type(config_of(kind, sets))
    source = load_recipe(f"{RECIPES / family}_imagenet.py:data=gs://bucket/imagenet").data.source
    assert isinstance(source, ArrayRecordSource)
    assert source.train == ("gs://bucket/imagenet/train-*.array_record",)


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_docstring_tells_paper_command_and_result(family: str) -> None:
    path = RECIPES / f"{family}_imagenet.py"
    text = path.read_text()
    docstring = text.split('"""')[1]
    assert 25 <= len(text.splitlines()) <= 90  # what all share is in `imagenet_recipe`
    for words in ("Paper: ", "arXiv ", f"Command: nfnet train recipes/{path.name}:variant=", "--debug", "Published"):
        assert words in docstring
    # The figures of the table are those of `nfnet models`, in its order.
    prefix = {"nfnet": "nfnet_f", "efficientnet": "efficientnet_b"}.get(family)
    figures = [float(figure) for figure in re.findall(r"(\d\d\.\d)%", docstring)]
    assert figures == [value for name, value in PUBLISHED_TOP1_PERCENT.items() if prefix and name.startswith(prefix)]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("reduction", {"reduction": FastSum()}),
        (r"optim\.method", {"optim": OptimConfig(method=Muon())}),
    ],
)
def test_what_depends_on_the_number_of_devices_is_no_reproducible_run(field: str, change: dict[str, Any]) -> None:
    recipe = load("nfnet", "f0")
    with pytest.raises(ConfigError, match=rf"^{field} = .*gives other bits .* execution\.reproducible = False"):
        dataclasses.replace(recipe, **change)
    fast = dataclasses.replace(recipe.execution, reproducible=False)
    assert not dataclasses.replace(recipe, execution=fast, **change).execution.reproducible
    assert dataclasses.replace(recipe, reduction=OrderedSum()).reduction == OrderedSum()


def test_a_batch_that_does_not_divide_into_its_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match="images_per_part = 24: must divide batch 1024"):
        imagenet_recipe(
            "mine",
            model_config("nf_resnet50"),
            ImageSizes(train=128, test=160),
            RESNET_OPTIM,
            num_epochs=1.0,
            batch_size=1024,
            images_per_part=24,
        )


def test_variants_of_one_network_differ_where_the_papers_say_so() -> None:
    assert load("nfnet", "f0+").name == "nfnet_f0+"
    nfnet = load("nfnet", "f3").model
    assert isinstance(nfnet, NFNetConfig)
    assert (nfnet.drop_rate, nfnet.stochdepth_rate, nfnet.compute_dtype) == (0.4, 0.25, "bfloat16")
    decays = [load("nf_regnet", f"b{level}").optim.weight_decay for level in range(6)]
    assert decays == pytest.approx([5e-5, 6e-5, 7e-5, 8e-5, 9e-5, 1e-4])
    assert load("nf_regnet", "b0").optim.schedule == Cosine(final_learning_rate=0.001)
    nf_resnet = load("nf_resnet", "50").model
    assert isinstance(nf_resnet, NFResNetConfig)
    assert nf_resnet.drop_rate == 0
    assert load_recipe(RECIPES / "nf_regnet_imagenet.py") == load("nf_regnet", "b0")


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("nfnet", "variant=f9", "variant = 'f9': known are f0, f1, f2, f3, f4, f5, f6, f7, and each with a +"),
        ("nf_regnet", "variant=c0", "variant = 'c0': known are b0, b1, b2, b3, b4, b5, b6, b7, b8"),
        ("nf_resnet", "variant=51", "variant = '51': known are 50, 101, 152, 200, 288, 600"),
        ("resnet", "variant=v1", "variant = 'v1': known are 50, 101, 152, 200, se_resnext_d50"),
        ("efficientnet", "variant=b8", "variant = 'b8': known are b0, b1, b2, b3, b4, b5, b6, b7"),
        ("nfnet", "varient=f1", "no parameter 'varient': it has variant"),
        ("nfnet", "f1", "'f1' is not a name=value"),
        ("nfnet", "variant=", "'variant=' is not a name=value"),
        ("nfnet", "variant=f1,variant=f2", "'variant=f2' is not a name=value"),
        ("nfnet", "", "'' is not a name=value"),
    ],
)
def test_a_wrong_argument_is_answered_with_the_known_ones(
    family: str, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"{RECIPES / family}_imagenet.py:{arguments}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(path)
    for command in (["train", path, "--workdir", "unused"], ["plan", path, "--topology", "v5e:1x1"]):
        assert cli.main(command) == exit_codes.EXIT_BAD_INPUT
        assert message in capsys.readouterr().err


def test_an_argument_arrives_as_its_annotation_says(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses, pathlib, typing\n"
        "import nfnet_flax\n"
        f"BASE = nfnet_flax.load_recipe({str(RECIPES / 'digits.py')!r})\n"
        "def recipe(n: int = 1, rate: float | None = None, flag: bool = False, size: typing.Optional[int] = 9,\n"
        "           either: int | str = 0, text: str = '', place: pathlib.Path = None, bare=None):\n"
        "    return dataclasses.replace(BASE, name=repr([n, rate, flag, size, either, text, place, bare]))\n"
    )

    def made(arguments: str) -> str:
        return load_recipe(f"{tmp_path / 'mine.py'}:{arguments}").name

    assert made("n=4,rate=0.5,flag=true,size=none") == "[4, 0.5, True, None, 0, '', None, None]"
    assert made("n=-3,rate=none,flag=False,size=7") == "[-3, None, False, 7, 0, '', None, None]"
    assert made("either=8,text=8,place=8,bare=8") == "[1, None, False, 9, 8, '8', '8', '8']"
    assert made("either=f3,text=none,bare=none") == "[1, None, False, 9, 'f3', 'none', None, 'none']"
    for arguments, message in (
        ("n=four", "takes n = 'four': expected int"),
        ("n=4.0", "takes n = '4.0': expected int"),
        ("flag=1", "takes flag = '1': expected bool"),
        ("rate=fast", "takes rate = 'fast': expected float or none"),
    ):
        with pytest.raises(ConfigError, match=rf"mine\.py': its recipe\(\) {message}"):
            made(arguments)


def test_a_recipe_may_hold_dataclasses_and_import_a_module_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "import recipe_base\n"
        "@dataclasses.dataclass\n"
        "class Variant:\n"
        "    seed: int = 5\n"
        "def recipe():\n"
        "    import recipe_late\n"
        "    return dataclasses.replace(recipe_base.BASE, seed=Variant().seed, name=recipe_late.NAME)\n"
    )
    (tmp_path / "recipe_late.py").write_text("NAME = 'late'\n")
    (tmp_path / "recipe_base.py").write_text(
        f"import nfnet_flax\nBASE = nfnet_flax.load_recipe({str(RECIPES / 'digits.py')!r})\n"
    )
    before = list(sys.path)
    recipe = load_recipe(tmp_path / "mine.py")
    assert (recipe.name, recipe.seed, recipe.num_classes) == ("late", 5, 10)
    assert sys.path == [*before, str(tmp_path)]  # last, for what is imported when code of the file is called


def test_the_published_schedules() -> None:
    # arXiv 2101.08692's code: 5 epochs up to 0.4, half a cosine down to 0.001.
    config = OptimConfig(learning_rate_per_256=0.1, warmup_epochs=5.0, schedule=Cosine(final_learning_rate=0.001))
    schedule = make_schedule(config, batch_size=1024, steps_per_epoch=10.0, num_steps=150)
    assert [float(schedule(step)) for step in (0, 25, 50, 100, 150)] == pytest.approx([0, 0.2, 0.4, 0.2005, 0.001])
    # arXiv 1905.11946's: the falls are counted from the beginning, under the warm-up.
    decay = ExponentialDecay(factor=0.97, every_epochs=2.4)
    config = OptimConfig(learning_rate_per_256=0.016, warmup_epochs=5.0, schedule=decay)
    schedule = make_schedule(config, batch_size=4096, steps_per_epoch=10.0, num_steps=3500)
    want = [0, 0.128, 0.256 * 0.97**2, 0.256 * 0.97**2, 0.256 * 0.97**3, 0.256 * 0.97**145]
    assert [float(schedule(step)) for step in (0, 25, 50, 71, 72, 3499)] == pytest.approx(want, rel=1e-5)


def test_rmsprop_is_tensorflows() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3))
    config = OptimConfig(clipping=None, weight_decay=0.1, method=RMSProp(decay=0.8, eps=1e-2))
    rates = [0.5, 0.25, 0.125]
    tx = make_optimizer(
        config, lambda step: jnp.asarray(rates)[step], {name: name for name in ("a.kernel", "a.bias", "a.gain")}
    )
    params = {name: jnp.asarray(weight, jnp.float32) for name in ("a.kernel", "a.bias", "a.gain")}
    state = tx.init(params)
    average, momentum = np.ones((4, 3)), np.zeros((4, 3))
    for rate in rates:
        gradient = rng.standard_normal((4, 3))
        updates, state = tx.update({name: jnp.asarray(gradient, jnp.float32) for name in params}, state, params)
        params = optax.apply_updates(params, updates)
        gradient = gradient + 0.1 * weight
        average = 0.8 * average + 0.2 * gradient**2
        momentum = 0.9 * momentum + rate * gradient / np.sqrt(average + 1e-2)
        weight = weight - momentum
        np.testing.assert_allclose(params["a.kernel"], weight, rtol=1e-5, atol=1e-6)
    assert not np.allclose(params["a.bias"], weight, atol=1e-3)  # without decay


def test_wrong_settings_of_the_optimizer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.method\.decay = 1"):
        RMSProp(decay=1.0)
    with pytest.raises(ConfigError, match=r"optim\.method\.eps = 0"):
        RMSProp(eps=0.0)
    with pytest.raises(ConfigError, match=r"optim\.schedule\.factor = 1\.5"):
        ExponentialDecay(factor=1.5)
    with pytest.raises(ConfigError, match=r"optim\.schedule\.every_epochs = 0"):
        ExponentialDecay(every_epochs=0.0)
    with pytest.raises(ConfigError, match=r"optim\.schedule\.final_learning_rate = -0\.1"):
        Cosine(final_learning_rate=-0.1)


@pytest.mark.parametrize(("family", "variant"), [(family, row[0][-1]) for family, row in PUBLISHED.items()])
def test_a_debug_recipe_keeps_everything_but_sizes(family: str, variant: str) -> None:
    recipe = load(family, variant)
    small = debug_recipe(recipe)
    assert type(small.model) is type(recipe.model)
    assert small.optim == recipe.optim
    assert small.data.augment == recipe.data.augment
    assert small.data.randaugment == recipe.data.randaugment
    assert (small.data.mixing is None) == (recipe.data.mixing is None)
    assert isinstance(small.data.source, SyntheticSource)
    assert (small.num_steps, small.data.batch_size) == (4, 16)
    if isinstance(recipe.model, EfficientNetConfig):
        assert isinstance(small.optim.method, RMSProp)


def test_a_debug_run_goes_through_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nfnet_flax.cli", "train", f"{RECIPES / 'nfnet_imagenet.py'}:variant=f6"]
    command += ["--debug", "--workdir", str(tmp_path / "run"), "--seed", "3", "--model.depths", "1"]
    command += ["--model.widths", "16", "--checkpoint.every-minutes", "0.000001", "--checkpoint.keep-last", "9"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "on 20 examples" in done.stdout
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (stored["name"], stored["seed"]) == ("nfnet_f6_debug", 3)
    assert stored["data"]["randaugment"]["magnitude"] == 15
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 4
    assert np.all(np.isfinite(losses))
    assert [line["step"] for line in lines if "eval/top1" in line] == [2, 4]
    # By the clock at every log step, not only at every second step.
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "2", "3", "4"]


def test_what_a_recipe_needs_is_said_with_an_example(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def recipe(weights: str, data: str, seed: int = 0):\n    raise ValueError(weights, data)\n")
    with pytest.raises(
        ConfigError, match=rf"needs values for weights and data: give {path}:weights=\.\.\.,data=\.\.\."
    ):
        load_recipe(path)
    with pytest.raises(ConfigError, match=rf"needs values for data: give {path}:weights=runs/mine,data=\.\.\."):
        load_recipe(f"{path}:weights=runs/mine")
    with pytest.raises(ConfigError, match=r"\('runs/mine', 'my, photos'\)"):  # a comma in the name of a folder
        load_recipe(f"{path}:weights=runs/mine,data=my, photos,seed=3")


def test_a_path_with_a_typo_is_answered_with_the_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "digits.py").touch()
    with pytest.raises(ConfigError, match=r"digts\.py' does not exist: perhaps you mean digits\.py in the same folder"):
        load_recipe(tmp_path / "digts.py")
    with pytest.raises(ConfigError, match=r"does not exist: give the path of a \.py file"):
        load_recipe(tmp_path / "zzz.py")
    with pytest.raises(ConfigError, match=rf"there is no folder '{tmp_path}/none'"):
        load_recipe(tmp_path / "none" / "digits.py")
    (tmp_path / "digits.txt").touch()
    with pytest.raises(ConfigError, match=r"is not a \.py file"):
        load_recipe(tmp_path / "digits.txt")
