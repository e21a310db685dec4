"""Messages about damaged images: each command only advises options that it has, and the advice helps."""

import dataclasses
from pathlib import Path

import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.cli import probe
from nfnet_flax.messages import Advice, advising, as_given
from tests.test_cli import fails
from tests.test_input_runs import options
from tests.test_input_runs import root as root  # a fixture

SKIP = "--data.on-corrupt skip"
NOTE = "(--data.on-corrupt is an option of nfnet train; nfnet {} has no such option)"


def damage(path: Path) -> Path:
    """Cuts an image file short."""
    path.write_bytes(path.read_bytes()[:500])
    return path


def test_each_command_advises_what_it_has(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*options(root, tmp_path), "--num-steps", "1", "--no-tensorboard"]
    assert cli.main(words) == exit_codes.EXIT_DONE
    run = str(tmp_path / "run")
    first = damage(root / "val" / "class_0" / "000.png")
    for path in (root / "train").rglob("*.png"):
        damage(path)

    message = fails(capsys, "eval", "--workdir", run)
    assert SKIP in message
    assert "no such option" not in message
    assert cli.main(["eval", "--workdir", run, *SKIP.split()]) == exit_codes.EXIT_DONE
    assert "1 of the 8 held-out images cannot be decoded" in capsys.readouterr().err

    message = fails(capsys, "signal", run, "--held-out")
    assert str(first) in message
    assert message.endswith(NOTE.format("signal"))

    message = fails(capsys, "train", *words[1:-1], "--workdir", f"{run}2")
    assert SKIP in message
    assert "no such option" not in message


def test_a_probe_leaves_damaged_images_out_as_its_message_says(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*options(root, tmp_path), "--num-steps", "1", "--no-tensorboard"]) == exit_codes.EXIT_DONE
    words = ["probe", str(root), "--weights", str(tmp_path / "run")]
    trained = damage(root / "train" / "class_3" / "013.png")
    held_out = damage(root / "val" / "class_0" / "000.png")
    message = fails(capsys, *words)
    assert str(trained) in message
    assert "or give --on-corrupt skip to go on without such images" in message
    assert "--data." not in message
    assert cli.main([*words, "--on-corrupt", "skip"]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr()
    assert f"1 of the 40 training images cannot be decoded and are left out of the probe; the first is {trained}" in (
        printed.err
    )
    assert f"1 of the 8 held-out images cannot be decoded and are left out of the probe; the first is {held_out}" in (
        printed.err
    )
    assert "on 7 held-out images" in printed.out
    assert printed.out.splitlines()[-2].split()[:2] == ["all", "39"]
    for path in (root / "val").rglob("*.png"):
        damage(path)
    assert "none of the 8 held-out images can be decoded" in fails(capsys, *words, "--on-corrupt", "skip")


def test_advice_is_fitted_to_the_command_once() -> None:
    fields = {field.name for field in dataclasses.fields(probe.ProbeOptions)}
    assert {word.removeprefix("--").replace("-", "_") for word in probe.WORDS.values()} <= fields
    text = "name the column by --data.source.label. Or give --data.source.encoding latin-1, or --optim.clipping none"
    assert as_given(text) == text
    with advising(Advice(command="nfnet x", topics=("optim",), words={"--data.source.label": "--label"})):
        fitted = as_given(text)
        assert as_given(fitted) == fitted
        with advising(None):
            assert as_given(text) == text
    assert fitted == (
        "name the column by --label. Or give --data.source.encoding latin-1, or --optim.clipping none "
        "(--data.source.encoding is an option of nfnet train; nfnet x has no such option)"
    )
