"""`nfnet claim cuts`: the cut over devices on real runs, killed ones among them, and the page."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest

from nfnet_flax import cli
from nfnet_flax.claims import cuts
from nfnet_flax.claims.cell import RESULT, Result, read_result
from nfnet_flax.claims.cuts_measured import Measured, RunRow, from_data, measure
from nfnet_flax.claims.cuts_shown import picture, text
from nfnet_flax.claims.evidence import FILE, Evidence, read_evidence
from nfnet_flax.claims.study import run_study
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from tests import runs
from tests.documents import text_of

DEVICES = (1, 8)
STUDY = cuts.Study(
    images_per_part=(64, 8), devices=DEVICES, seeds=(0,), steps=24, image_size=16, widths=(8,), depths=(1,)
)
OPTIONS = {
    "jobs": (2,),
    "images-per-part": STUDY.images_per_part,
    "devices": DEVICES,
    "seeds": (1,),
    "steps": (STUDY.steps,),
    "image-size": (STUDY.image_size,),
    "widths": STUDY.widths,
    "depths": STUDY.depths,
}
WORDS = ["claim", "cuts", *(word for name, values in OPTIONS.items() for word in (f"--{name}", *map(str, values)))]
STORED = runs.ROOT / "docs" / "claims" / "cuts.json"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cuts.Cell]:
    """The folder of a study that was killed with all its runs, then started again; and a run that was killed before
    its end."""
    folder = tmp_path_factory.mktemp("cuts")
    environment = {**os.environ, **runs.OPTIMIZED}
    command = [sys.executable, "-m", "nfnet_flax.cli", *WORDS, "--out", str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        cell = _wait_for_a_checkpoint(folder, process)
    finally:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        process.wait()
    assert read_result(folder / cell.name) is None
    assert not (folder / FILE).exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300)
    return folder, cell


def _wait_for_a_checkpoint(folder: Path, process: "subprocess.Popen[bytes]") -> cuts.Cell:
    while process.poll() is None:
        for cell in cuts.cells(STUDY):
            if (folder / cell.name / "run" / "checkpoints" / "2").exists():
                return cell
        time.sleep(0.01)
    raise AssertionError("no run was seen to save")


@pytest.fixture(scope="module")
def measured(killed: tuple[Path, cuts.Cell]) -> Measured:
    return from_data(read_evidence(killed[0] / FILE, "cuts").data)


def test_devices_change_no_bit_and_parts_of_batch_norm_change_the_training(measured: Measured) -> None:
    for network in cuts.NETWORKS:
        of_network = [row for row in measured.runs if row.network == network]
        on_devices = [row for row in of_network if row.images_per_part == 8]
        assert [row.num_devices for row in on_devices] == list(DEVICES)
        assert len({(row.bits, row.loss, row.top1) for row in on_devices}) == 1  # none, bit for bit
        assert len({row.bits for row in of_network}) == 2  # the number of parts changes them
    end = {each.network: each.parameters for each in measured.differences if each.step == STUDY.steps}
    assert 0 < end["nf_resnet"] < 1e-4  # by rounding
    assert end["resnet"] > 1e-2  # by other statistics


def test_only_batch_norm_has_a_gap_between_the_modes(measured: Measured) -> None:
    for row in measured.runs:
        assert row.training_mode_loss is not None
        is_same = row.training_mode_loss == row.evaluation_mode_loss
        assert is_same == (row.network == "nf_resnet")


def test_a_killed_run_has_the_numbers_of_one_that_was_not_and_another_seed_has_others(
    killed: tuple[Path, cuts.Cell], measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in runs.OPTIMIZED.items():
        monkeypatch.setenv(name, value)
    cell = killed[1]
    of_name = {each.name: each for each in (cell, dataclasses.replace(cell, seed=1))}
    recipes = {name: cuts.recipe_of(each, STUDY) for name, each in of_name.items()}
    variables = {name: cuts.variables_of(each) for name, each in of_name.items()}
    results = run_study(recipes, tmp_path, num_jobs=2, variables=variables)
    again = measure(STUDY, {of_name[name]: result for name, result in results.items()}, tmp_path)
    same, other = sorted(again.runs, key=lambda row: row.seed)
    (before,) = [row for row in measured.runs if dataclasses.replace(cell, seed=row.seed) == _cell(row)]
    assert (same.bits, same.loss, same.top1) == (before.bits, before.loss, before.top1)
    assert other.bits != same.bits
    assert other.loss != same.loss


def test_damaged_checkpoints_are_told_with_what_to_do(killed: tuple[Path, cuts.Cell], tmp_path: Path) -> None:
    cell = killed[1]
    shutil.copytree(killed[0] / cell.name, tmp_path / cell.name)
    checkpoints = tmp_path / cell.name / "run" / "checkpoints"
    for path in [*checkpoints.rglob("*"), *(checkpoints.parent / "best").rglob("*")]:
        if path.is_file():
            path.write_bytes(b"damaged")
    advice = rf"remove this folder \({tmp_path}/{cell.name}\); the same command then repeats this run"
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/{cell.name} has no good checkpoint of step 24: {advice}$"):
        measure(STUDY, {cell: Result(outcome="finished", step=24, metrics={})}, tmp_path)
    (tmp_path / cell.name / RESULT).unlink()
    said = rf"^the run in \S+ cannot go on: all checkpoints in '{checkpoints}' are damaged: {advice} \(log: \S+/log\)$"
    with pytest.raises(ConfigError, match=said):
        run_study({cell.name: cuts.recipe_of(cell, STUDY)}, tmp_path, num_jobs=1, variables={})


def _cell(row: RunRow) -> cuts.Cell:
    return cuts.Cell(
        seed=row.seed, network=row.network, images_per_part=row.images_per_part, num_devices=row.num_devices
    )


def test_the_picture_is_drawn_from_the_evidence() -> None:
    pytest.importorskip("matplotlib")
    found = read_evidence(STORED, "cuts")
    drawn = picture(found, "svg")
    assert xml.etree.ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert picture(found, "svg") == drawn
    assert picture(_diverged(found), "svg") != drawn


def test_runs_that_diverged_are_counted() -> None:
    found = read_evidence(STORED, "cuts")
    said = text(_diverged(found))
    num_seeds = len(from_data(found.data).study.seeds)
    assert f"| BatchNorm ResNet | 64 | - | - | - | - | - | {num_seeds} of {num_seeds} |" in said
    assert "BatchNorm ResNet: a run diverged." in said


def _diverged(found: Evidence) -> Evidence:
    """Evidence in which all runs with BatchNorm diverged."""
    before = from_data(found.data)
    rows = (
        RunRow(
            network=row.network,
            images_per_part=row.images_per_part,
            num_devices=row.num_devices,
            seed=row.seed,
            outcome="diverged",
            top1=None,
            loss=None,
            training_mode_loss=None,
            evaluation_mode_loss=None,
            bits=None,
        )
        if row.network == "resnet"
        else row
        for row in before.runs
    )
    differences = (each for each in before.differences if each.network != "resnet")
    after = Measured(study=before.study, runs=tuple(rows), differences=tuple(differences))
    return dataclasses.replace(found, data=dataclasses.asdict(after))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--images-per-part 64 5", r"images_per_part = \(64, 5\): give powers of two"),
        ("--images-per-part 8", r"images_per_part = \(8,\): give at least two"),
        ("--devices 1 3", r"devices = \(1, 3\): give powers of two"),
        ("--seeds 0", "seeds = 0: must be at least 1"),
        ("--steps 0", "steps = 0: must be at least 1"),
        ("--learning-rate 0", "learning_rate = 0.0: must be positive"),
        ("--clipping -1", "clipping = -1.0: must be positive, or 0"),
        ("--jobs 0", "jobs = 0: must be at least 1"),
        ("--widths 0", r"model.widths = \(0,\): every stage"),
    ],
)
def test_bad_options_are_refused(options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["claim", "cuts", "--out", str(out), *options.split()]) == EXIT_BAD_INPUT
    assert re.search(said, capsys.readouterr().err)
    assert not out.exists()


def test_evidence_of_another_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="evidence of another form"):
        from_data({"study": {}, "runs": [{}], "differences": []})


def test_claims_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claim", "--help"]) == EXIT_DONE
    assert "  cuts  " in capsys.readouterr().out
    assert cli.main(["claim", "cut"]) == EXIT_BAD_INPUT
    assert "unknown claim 'cut': known are agc, cost, cuts, exact, latency" in capsys.readouterr().err


def test_the_page_shows_what_the_evidence_says() -> None:
    found, page = read_evidence(STORED, "cuts"), text_of("docs/claims.md")
    for part in text(found).split("\n\n")[1:]:  # without the command and the machine
        assert part in page
    assert f"\n{found.command.removesuffix(' --out claims/cuts')}\n" in page  # its default
    xml.etree.ElementTree.parse(STORED.with_suffix(".svg"))
