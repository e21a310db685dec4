"""Options of the command line: what they set, what help shows of them, and what is said of wrong ones."""

import dataclasses
import re

import pytest
import tyro

from nfnet_flax import cli, exit_codes
from nfnet_flax.cli import alternatives, recipe_options
from nfnet_flax.data.augment_config import AffineAugment
from nfnet_flax.data.mixing_config import MixingConfig
from nfnet_flax.data.source_config import ArrayRecordSource, FolderSource
from nfnet_flax.models import EfficientNetConfig
from nfnet_flax.optim import AGC, AdamW, ClipValue, ExponentialDecay, SAMConfig
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe
from tests.runs import DIGITS, ROOT
from tests.test_cli import fails


def changed(*options: str, recipe: str = str(DIGITS)) -> Recipe:
    """The recipe that a command runs."""
    given = recipe_options.read("train", [recipe, *options])
    return tyro.cli(tyro.conf.AvoidSubcommands[Recipe], args=given.options, default=given.config)


def test_what_a_recipe_leaves_out_is_turned_on_by_any_of_its_options() -> None:
    assert load_recipe(DIGITS).optim.sam is None
    assert changed("--optim.sam.rho", "0.1", "--seed", "3").optim.sam == SAMConfig(rho=0.1)
    assert changed("--optim.sam", "SAMConfig").optim.sam == SAMConfig()
    assert changed("--optim.sam.rho=0.1", "--optim.clipping.ratio", "0.3").optim.clipping == AGC(ratio=0.3)
    uphill = f"{ROOT / 'recipes' / 'nfnet_imagenet.py'}:variant=f6"
    assert changed(recipe=uphill).optim.sam is not None
    assert changed("--optim.sam", "none", recipe=uphill).optim.sam is None


def test_a_part_of_a_recipe_may_be_of_another_type() -> None:
    recipe = changed("--data.source", "FolderSource", "--data.source.root", "/photos", "--data.num_held_out", "9")
    assert recipe.data.source == FolderSource(root="/photos")
    assert recipe.data.num_held_out == 9
    words = ("--data.source.train", "a*", "b*", "--data.source=ArrayRecordSource", "--data.source.eval", "c*")
    assert changed(*words).data.source == ArrayRecordSource(train=("a*", "b*"), eval=("c*",))
    augment = changed("--data.augment", "AffineAugment", "--data.augment.max-shift", "0.2").data.augment
    assert augment == AffineAugment(max_shift=0.2)
    assert changed("--model", "EfficientNetConfig").model == EfficientNetConfig()
    optim = changed("--optim.method", "AdamW", "--optim.method.b1", "0.8", "--optim.clipping", "none").optim
    assert (optim.method, optim.clipping) == (AdamW(b1=0.8), None)
    clipped = ("--optim.clipping=ClipValue", "--optim.clipping.max-abs=0.5", "--optim.schedule", "ExponentialDecay")
    optim = changed(*clipped, "--optim.learning-rate=0.5", "--optim.learning-rate-per-256=None").optim
    assert (optim.clipping, optim.schedule) == (ClipValue(max_abs=0.5), ExponentialDecay())
    assert optim.peak_learning_rate(64) == 0.5
    # The group fits no batch of the recipe's size: only all options together are valid.
    mixed = changed("--data.mixing.group-size", "12", "--data.batch-size", "36").data
    assert (mixed.mixing, mixed.batch_size) == (MixingConfig(group_size=12), 36)


def test_options_of_unclear_or_unknown_types_are_answered_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = ("train", str(DIGITS), "--workdir", "unused")
    assert "give --data.augment AffineAugment or CropAugment" in fails(capsys, *start, "--data.augment.max-shift", "1")
    assert "unknown value of --data.source 'Folder'" in fails(capsys, *start, "--data.source", "Folder")
    assert "--data.source.root" in fails(capsys, *start, "--data.source", "FolderSource")
    both = fails(capsys, *start, "--optim.sam", "none", "--optim.sam.rho", "1")
    assert "--optim.sam.rho: --optim.sam is none: leave one of the two out" in both
    assert "--optim.sam.rho" in fails(capsys, *start, "--optim.sam.ro", "1")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--optim.clipping 0.02", "a number is the value of a field, such as --optim.clipping.ratio 0.02"),
        ("--optim.momentum=0.5", "there is no optim.momentum: give --optim.method SGD, and --optim.method.*"),
        ("--optim.rmsprop.decay 0.9", "there is no optim.rmsprop: give --optim.method RMSProp, and"),
        ("--optim.final-learning-rate 0", "there is no optim.final_learning_rate: give --optim.schedule Cosine, and"),
    ],
)
def test_an_option_of_earlier_versions_is_answered_with_the_one_of_now(
    words: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remedy in fails(capsys, "train", str(DIGITS), "--workdir", "unused", *words.split())


def test_a_recipe_that_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "plan"):
        assert "the recipe is missing: nfnet " in fails(capsys, command)
        assert f"the recipe is missing: nfnet {command} RECIPE.py --seed 1" in fails(capsys, command, "--seed", "1")
        late = fails(capsys, command, "--seed", "1", "mine.py")
        assert f"the recipe 'mine.py' must come first: nfnet {command} mine.py --seed 1" in late


def test_an_empty_path_or_a_url_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", str(DIGITS), "--workdir"], ["eval", "--workdir"], ["doctor", "--workdir"]):
        assert "workdir = ''" in fails(capsys, *words, "")
        assert "is a URL of a kind that is not supported" in fails(capsys, *words, "az://bucket/run")
        assert "holds a backslash" in fails(capsys, *words, "tr\\ain")
    assert "has one slash" in fails(capsys, "convert", "run", "s3:/bucket/run", "--out", "weights")
    assert "holds a backslash" in fails(capsys, "convert", "run", "tr\\ain", "--out", "weights")


def printed_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints for `--help`."""
    try:
        code = cli.main([*words, "--help"])
    except SystemExit as stopped:  # tyro's
        code = stopped.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert (code, captured.err) == (exit_codes.EXIT_DONE, "")
    return captured.out


@pytest.mark.parametrize("words", [["train", str(DIGITS)], ["train"], ["plan"]])
def test_help_shows_every_field_of_every_type(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_help(capsys, *words)
    for choice in alternatives.choices(load_recipe(DIGITS)):
        assert f"{choice.option} {{{','.join(choice.names)}}}" in printed
        for kind in choice.known.values():
            for field in dataclasses.fields(kind):
                assert f"{choice.option}.{field.name}".replace("_", "-") in printed
    assert ("--topology" in printed) == (words == ["plan"])
    assert ("--workdir" in printed) == (words != ["plan"])


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", str(DIGITS)], ["--workdir DIR", "--init-from {None}|FILE|FOLDER|NAME", "--data.source.file FILE"]),
        (["eval"], ["--workdir DIR", "--weights FILE|FOLDER|NAME", "--json FILE|-", "--classes FILE"]),
        (["predict"], ["--workdir DIR", "--images-from FILE|-", "--csv FILE|-", "--top N", "--mean RED GREEN BLUE"]),
        (["export"], ["--out DIR", "--name NAME", "--image-size PIXELS", " [FILE|FOLDER|NAME]"]),
        (["probe"], [" FOLDER|FILE.csv", "--weights FILE|FOLDER|NAME", "--label COLUMN", "--shots N ..."]),
        (["convert"], ["--out DIR", "--model NAME", "nfnet convert run [-h] [OPTIONS] DIR"]),
        (["doctor"], ["--workdir DIR", "--recipe RECIPE.py", "--timeout-s SECONDS"]),
        (["models"], ["nfnet models [-h] [PATTERN]"]),
    ],
)
def test_help_names_what_an_option_takes(
    words: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = printed_help(capsys, *words)
    assert re.search(r"\bSTR\b", printed) is None
    assert [text for text in shown if text not in printed] == []


def test_help_is_in_whole_paragraphs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = [line.strip("│ ") for line in printed_help(capsys, "eval").splitlines()]
    first = next(index for index, line in enumerate(words) if line.startswith("File of ReaL"))
    assert all(len(line) > 90 for line in words[first : first + 2])


def test_help_of_convert_shows_the_options_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_help(capsys, "convert")
    for words in ("nfnet convert haiku", "nfnet convert timm", "nfnet convert run", "--timm-form", "--parameters"):
        assert words in printed
    printed = printed_help(capsys, "convert", "run")
    assert "--timm-form" not in printed
    assert "--checkpoint {newest,best}|STEP" in printed


def test_help_of_eval_shows_what_may_be_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_help(capsys, "eval")
    for words in ("--workdir", "--checkpoint {newest,best}|STEP", "--data.source.root", "--data.eval-batch-size"):
        assert words in printed
    assert "--optim" not in printed
