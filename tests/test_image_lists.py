"""Lists of images that are given to `nfnet predict`, as files and by a pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nfnet_flax import cli
from nfnet_flax.exit_codes import EXIT_DONE
from tests.image_sets import image_file
from tests.runs import ROOT
from tests.test_cli import fails
from tests.test_predict import NOTED, small

WEIGHTS = ("--weights", "w.safetensors")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network and images, which is the current one."""
    monkeypatch.chdir(tmp_path)
    small(tmp_path / "w.safetensors", preprocessing=NOTED)
    (tmp_path / "more").mkdir()
    for name in ("a.png", "b c.png", " kept .png ", "more/1.png", "more/2.png"):
        (tmp_path / name).write_bytes(image_file(1, "PNG"))
    return tmp_path


def files(printed: str) -> list[str]:
    return [json.loads(line)["file"] for line in printed.splitlines()]


def test_a_list_names_files_folders_and_patterns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\ufeffmore\r\n\r\n  \n kept .png \n  b c.png \r\nmore/[2].png\t\na.png"
    (folder / "list.txt").write_bytes(text.encode())
    words = ("--images-from", "list.txt", "--json", "-", *WEIGHTS)
    listed = ["more/1.png", "more/2.png", " kept .png ", "b c.png", "more/2.png", "a.png"]
    assert cli.main(["predict", *words]) == EXIT_DONE
    assert files(capsys.readouterr().out) == listed
    assert cli.main(["predict", "a.png", *words]) == EXIT_DONE
    assert files(capsys.readouterr().out) == ["a.png", *listed]


def test_a_pipe_may_name_files_that_are_not_utf8(folder: Path) -> None:
    name, written = "café.png".encode("latin-1"), "caf\\351.png"
    try:
        Path(os.fsdecode(name)).write_bytes(image_file(2, "PNG"))
    except OSError:  # a file system that takes only names in UTF-8: the pipe is tested with such a name
        name, written = "café.png".encode(), "caf\\303\\251.png"
        Path(os.fsdecode(name)).write_bytes(image_file(2, "PNG"))
    command = f"{sys.executable} -m nfnet_flax.cli predict --json - {' '.join(WEIGHTS)} --images-from"
    listing = f"printf 'a.png\\n{written}\\n'"
    for line in (f"{listing} | {command} -", f"{command} <({listing})"):
        done = subprocess.run(
            ["bash", "-c", line],
            capture_output=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (EXIT_DONE, "2 of 2 images have a result\n")
        assert files(done.stdout) == ["a.png", os.fsdecode(name)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "'list.txt': cannot be read (No such file or directory): give a UTF-8 text with a file, folder or"),
        (b"", "'list.txt': names no images: give a UTF-8 text with a file, folder or pattern in each line"),
        (b"\r\n  \n", "'list.txt': names no images: give"),
        (b"a.png\n\ngone.png\n", "'list.txt': line 3 = 'gone.png': does not exist: give files, folders or patterns"),
        (b"a.png\n*.gif\n", "'list.txt': line 2 = '*.gif': no file matches this pattern"),
        (b"empty\n", "'list.txt': line 1 = 'empty': there is no image in this folder"),
        (b"a.png\ncaf\xe9\n", "'list.txt': line 2 = 'caf\\udce9': does not exist, and is not UTF-8: give a UTF-8 text"),
        ("a.png\n".encode("utf-16"), "'list.txt': is not a text of this form: give a UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    (folder / "empty").mkdir()
    if content is not None:
        (folder / "list.txt").write_bytes(content)
    assert f"images_from = {message}" in fails(capsys, "predict", "--images-from", "list.txt", *WEIGHTS)


def test_a_list_among_the_images_or_no_images_is_answered_with_the_option(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "list.txt").write_text("a.png\nb c.png\n")
    said = fails(capsys, "predict", "a.png", "list.txt", *WEIGHTS)
    assert said.endswith("images = 'list.txt': is a list of images: give it by --images-from list.txt")
    assert "by --images-from FILE" in fails(capsys, "predict", *WEIGHTS)


def test_results_do_not_replace_the_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "list.txt").write_text("a.png\n")
    words = ("--images-from", "list.txt", "--csv", "list.txt", "--overwrite")
    assert "csv = 'list.txt': is the list of images" in fails(capsys, "predict", *words, *WEIGHTS)
    assert (folder / "list.txt").read_text() == "a.png\n"
