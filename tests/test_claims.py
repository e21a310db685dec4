"""The frame of `nfnet claim`: studies of many runs, and how commands end."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nfnet_flax.claims.cell import RESULT
from nfnet_flax.claims.child import program_versions
from nfnet_flax.claims.evidence import evidence, origin, read_evidence, write_evidence
from nfnet_flax.claims.study import run_study, runs_of
from nfnet_flax.cli.claim_output import Picture, check_picture, conclude
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.json_files import write_json
from nfnet_flax.output import guarded_output
from nfnet_flax.recipe import save_recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.streams import drop_unwritten
from tests.runs import DIGITS


def test_a_result_is_not_taken_for_that_of_another_length(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load_recipe(str(DIGITS)), num_steps=4)
    folder = tmp_path / "cell"
    folder.mkdir()
    save_recipe(recipe, folder / "recipe.json")
    write_json(folder / RESULT, {"outcome": "finished", "step": 4, "metrics": {"eval/top1": 0.5}})
    assert run_study({"cell": recipe}, tmp_path, num_jobs=1)["cell"].metrics == {"eval/top1": 0.5}
    with pytest.raises(ConfigError, match="jobs = 0"):
        run_study({"new": recipe}, tmp_path, num_jobs=0)
    assert not (tmp_path / "new").exists()
    longer = dataclasses.replace(recipe, num_steps=8)
    with pytest.raises(
        ConfigError, match=r"another run \(num_steps: 4 -> 8\): give another --out, or remove this folder"
    ):
        run_study({"cell": longer}, tmp_path, num_jobs=1)
    (folder / "recipe.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"cell/recipe\.json is damaged \(.*\): remove this folder \(.*/cell\); the same"
    ):
        run_study({"cell": recipe}, tmp_path, num_jobs=1)


def test_a_cell_ends_although_its_input_is_still_open(tmp_path: Path) -> None:
    write_json(tmp_path / RESULT, {"outcome": "diverged", "step": 3, "metrics": {}})
    command = [sys.executable, "-m", "nfnet_flax.claims.cell", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        code = process.wait(timeout=60)  # `communicate` would close the input
        assert process.stderr is not None
        assert (code, process.stderr.read()) == (EXIT_DONE, b"")


def test_a_result_of_other_versions_is_refused_and_one_without_is_told(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load_recipe(str(DIGITS)), num_steps=4)
    kept = {"outcome": "finished", "step": 4, "metrics": {}}
    for name, more in (("old", {}), ("new", {"versions": program_versions(), "date": "2026-01-31"})):
        (tmp_path / name).mkdir()
        save_recipe(recipe, tmp_path / name / "recipe.json")
        write_json(tmp_path / name / RESULT, kept | more)
    found = run_study({"old": recipe, "new": recipe}, tmp_path, num_jobs=1)
    made = evidence("agc", "nfnet claim agc", {}, runs_of(found.values()))
    assert read_evidence(write_evidence(made, tmp_path), "agc") == made
    assert "; runs of 2026-01-31; versions and date of 1 of 2 runs not recorded)" in origin(made)
    write_json(tmp_path / "new" / RESULT, kept | {"versions": program_versions() | {"jax": "0.0.1"}, "date": ""})
    with pytest.raises(ConfigError, match=r"new has the result of a run by .*jax 0\.0\.1, and this is .*another --out"):
        run_study({"new": recipe}, tmp_path, num_jobs=1)


def test_a_picture_that_cannot_be_drawn_takes_nothing_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw() -> bytes:
        raise ImportError("libfoo.so is missing")

    found = evidence("agc", "nfnet claim agc", {})
    said = r"cannot be imported \(libfoo.so is missing\): pip install 'nfnet_flax\[plots\]', or give --no-picture"
    with pytest.raises(ConfigError, match=said):
        conclude(found, tmp_path, "| a table |", Picture("agc.svg", draw))
    assert capsys.readouterr().out == f"| a table |\n\nwritten: {tmp_path}/evidence.json\n"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="give --no-picture"):
        check_picture()


def test_a_reader_of_results_may_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", closefd=False) as stdout, monkeypatch.context() as replaced:
        replaced.setattr(sys, "stdout", stdout)
        with guarded_output(goes_on=True):
            conclude(evidence("agc", "nfnet claim agc", {}), tmp_path, "| a table |")
        drop_unwritten()
    os.close(write_end)
    assert capsys.readouterr().err == ""
    assert (tmp_path / "evidence.json").exists()
