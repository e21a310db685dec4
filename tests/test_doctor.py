"""`nfnet doctor`: runs that `nfnet train` made are sound; what is really broken is named with its remedy."""

import dataclasses
import functools
import itertools
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.doctor import examine
from nfnet_flax.doctor.data import check_data
from nfnet_flax.doctor.devices import check_devices
from nfnet_flax.doctor.findings import Finding
from nfnet_flax.doctor.machine import check_disks, check_machine, check_versions
from nfnet_flax.doctor.workdir import check_workdir
from nfnet_flax.recipe import Recipe, read_recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.run_folder import RunFolder
from tests import runs
from tests.image_sets import CLASSES, make_folder

SHORT = ["--num-steps=4", "--eval-every-steps=2", "--checkpoint.every-steps=2"]


def digits() -> Recipe:
    return load_recipe(runs.DIGITS)


def of_folder(root: Path) -> Recipe:
    """The digits recipe on an image folder."""
    recipe = digits()
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=FolderSource(root=str(root))))


def problems(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.is_wrong]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "sound"
    assert "finished: 4 steps" in runs.finish(runs.start(workdir, *SHORT))
    return workdir


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """The same run, moved; to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "moved"))


def doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code of the command, and what it printed."""
    capsys.readouterr()
    return cli.main(["doctor", *options]), capsys.readouterr().out


def test_the_command_names_all_that_is_broken_and_changes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.py"
    text = runs.DIGITS.read_text().replace("import DigitsSource", "import FolderSource")
    recipe.write_text(text.replace("DigitsSource()", f"FolderSource(root={str(tmp_path / 'nowhere')!r})"))
    (run / "checkpoints" / "6").mkdir()
    os.truncate(run / "recipe.json", 100)

    def everything() -> list[tuple[str, int, int]]:
        paths = sorted(tmp_path.rglob("*"))
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    before = everything()
    code, printed = doctor(capsys, "--workdir", str(run), "--recipe", str(recipe))
    assert code == exit_codes.EXIT_WRONG
    lines = [line.partition("WRONG: ")[2] for line in printed.splitlines() if "WRONG: " in line]
    assert len(lines) == 3, printed
    assert str(tmp_path / "nowhere") in lines[0]
    assert lines[1] == (
        f"{run / 'checkpoints' / '6'} is damaged (an empty folder): nfnet train sets it aside and goes on from step 4"
    )
    assert lines[2].startswith(f"{run / 'recipe.json'} is damaged (")
    assert lines[2].endswith("move it away and start nfnet train again, which writes it")
    assert printed.endswith("3 wrong, as marked above\n")
    assert everything() == before


def test_a_healthy_machine_needs_no_workdir(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--recipe", str(runs.DIGITS)]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    assert "x cpu" in printed
    assert "train: 1437 examples of 10 classes; the first is 32 x 32 px" in printed
    assert printed.endswith("nothing is wrong\n")


def workdir_problems(workdir: Path, recipe: Recipe | None = None) -> list[str]:
    return problems(check_workdir(RunFolder(workdir), recipe, until_s=time.monotonic() + 60))


def test_a_run_that_was_trained_moved_and_converted_is_sound(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "run", str(run), "--out", str(run.parent / "weights")]) == exit_codes.EXIT_DONE
    code, printed = doctor(capsys, "--workdir", str(run))
    assert (code, printed.splitlines()[-1]) == (exit_codes.EXIT_DONE, "nothing is wrong"), printed
    assert "checkpoints: steps 2, 4; newest 4 of " in printed
    assert "best: steps " in printed
    assert "metrics: 4 rows, to step 4" in printed
    assert "not enough time" not in printed
    assert re.search(r"tensorflow(-cpu)? \d+\.\d+", printed)


def test_a_recipe_that_does_not_fit_on_the_devices_is_named() -> None:
    execution = dataclasses.replace(digits().execution, fsdp=2)
    recipe = dataclasses.replace(digits(), execution=execution)
    with_one_device = functools.partial(check_devices, recipe, None, timeout_s=60)
    assert problems(with_one_device(is_stored=False)) == ["execution.fsdp = 2: must divide the 1 devices of this run"]
    stored = with_one_device(is_stored=True)
    assert problems(stored) == []
    here = "does not fit on the 1 devices of one process here"
    assert stored[-1].text == f"execution.fsdp = 2 {here}, but on those of 2 processes like it"


def test_a_folder_before_the_run_is_seen_as_it_is(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    look = functools.partial(check_workdir, RunFolder(workdir), None, until_s=time.monotonic() + 60)
    assert [finding.text for finding in look()] == [f"{workdir} does not exist yet; nfnet train makes it"]
    workdir.mkdir()
    assert [finding.text for finding in look()][1:] == ["checkpoints: none", "best: none", "no run has begun here"]


def test_what_is_left_of_a_kill_is_no_problem(run: Path) -> None:
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')
    findings = check_workdir(RunFolder(run), None, until_s=time.monotonic() + 60)
    assert problems(findings) == []
    text = "\n".join(finding.text for finding in findings)
    assert "6.orbax-checkpoint-tmp is being written" in text
    assert "metrics: 4 rows, to step 4" in text


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (lambda checkpoint: flip(largest(checkpoint / "state" / "ocdbt.process_0")), " instead of "),
    "cut index": (lambda checkpoint: os.truncate(largest(checkpoint / "state" / "d"), 100), "OUT_OF_RANGE"),
    "no arrays": (lambda checkpoint: shutil.rmtree(checkpoint / "state"), "NOT_FOUND"),
    "empty notes": (lambda checkpoint: os.truncate(checkpoint / "notes" / "notes.json", 0), "notes/notes.json"),
    "no notes": (lambda checkpoint: shutil.rmtree(checkpoint / "notes"), "notes/notes.json is missing"),
    "changed notes": (lambda checkpoint: change_notes(checkpoint / "notes" / "notes.json"), "is not what was saved"),
}


def change_notes(path: Path) -> None:
    path.write_text(path.read_text().replace('"evaluated": true', '"evaluated": false'))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named(kind: str, run: Path) -> None:
    damage, reason = DAMAGE[kind]
    damage(run / "checkpoints" / "4")
    (line,) = workdir_problems(run)
    assert line.startswith(f"{run}/checkpoints/4 is damaged (")
    assert reason in line
    assert line.endswith("): nfnet train sets it aside and goes on from step 2")
    # The files beside the arrays and notes are Orbax's own, and nothing that is restored is in them.
    for path in (run / "checkpoints" / "2").rglob("*"):
        if path.name in ("_CHECKPOINT_METADATA", "_METADATA", "_sharding"):
            path.unlink()
    assert workdir_problems(run) == [line]


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(run: Path) -> None:
    notes = run / "checkpoints" / "4" / "notes" / "notes.json"
    notes.unlink()
    notes.symlink_to(notes)  # whoever opens it is told that there are too many links
    (line,) = workdir_problems(run)
    assert line.startswith(f"{notes}: OSError: ")
    assert line.endswith("it need not be damaged")


def test_checkpoints_are_read_as_long_as_there_is_time(run: Path) -> None:
    findings = check_workdir(RunFolder(run), None, until_s=time.monotonic())
    assert problems(findings) == []
    assert findings[2].text == "checkpoints: not enough time to read the contents of 4, 2; give more --timeout-s"


def test_files_of_a_run_that_are_damaged_or_missing_are_named(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\0\0\n", *lines[1:]]))
    (run / "input.json").unlink()
    (run / "classes.json").unlink()
    stored = run / "recipe.json"
    recipe = dataclasses.replace(read_recipe(stored), seed=7)
    assert workdir_problems(run, recipe) == [
        f"{run}/metrics.jsonl is damaged (line 2): nfnet train keeps it as it is in {run}/damaged and goes on with the "
        "good rows",
        f"{run}/input.json is missing: put it back, or start in a new workdir",
        f"{run}/classes.json is missing: put it back, or start in a new workdir",
        "the run has another recipe (seed: 0 -> 7): use the values of the run",
    ]
    stored.unlink()
    assert workdir_problems(run)[-1].startswith(f"{run}/recipe.json is missing")
    assert workdir_problems(run / "metrics.jsonl") == [f"{run}/metrics.jsonl is no folder: give another workdir"]


def test_data_that_are_damaged_or_changed_are_named(tmp_path: Path) -> None:
    root, workdir = make_folder(tmp_path / "images"), tmp_path / "run"
    recipe = of_folder(root)
    runs.claimed(workdir, recipe)
    assert problems(check_data(recipe, workdir)) == []
    few = dataclasses.replace(recipe, num_classes=2)
    assert problems(check_data(few, None)) == ["num_classes = 2: must be at least 3"]
    renamed = (root / "train" / CLASSES[1]).rename(root / "train" / "other")
    (line,) = problems(check_data(recipe, workdir))
    assert "other" in line
    renamed.rename(root / "train" / CLASSES[1])
    os.truncate(workdir / "classes.json", 5)
    with pytest.raises(ConfigError, match=r"classes.json is damaged \(.*\): put it back"):
        check_data(recipe, workdir)
    (workdir / "classes.json").unlink()

    added = root / "train" / CLASSES[0] / "added.JPEG"
    added.write_bytes((root / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG").read_bytes())
    number, fingerprint = problems(check_data(recipe, workdir))
    assert number == "the run began with another input (source.num_examples: 12 -> 13): restore that input"
    assert "source.fingerprint" in fingerprint
    for path in (root / "val").rglob("*.JPEG"):
        os.truncate(path, path.stat().st_size // 2)
    train, held_out, damaged, *changes = check_data(recipe, workdir)
    assert train.text.startswith("train: 13 examples of 3 classes")
    assert held_out.text == "eval: 6 examples of 3 classes"
    assert damaged.is_wrong
    assert sum(change.text.startswith("the run began with another input") for change in changes) == 2
    assert re.search(r"ILSVRC2012_val_\d+.JPEG' \(example 0\): damaged", damaged.text)


def test_devices_that_are_missing_hang_or_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (hangs,) = problems(check_devices(None, None, is_stored=False, timeout_s=0.05))
    assert "no answer within 0.05 s" in hangs
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=7")
    findings = check_devices(digits(), None, is_stored=False, timeout_s=60)
    assert findings[0].text == "7 x cpu (cpu)"
    assert problems(findings) == [
        "execution.num_microbatches = 8: must be a multiple of the 7 devices of this run",
        "data.batch_size = 64: must be divisible by the 7 devices of this run",
        "data.eval_batch_size = 120: must be divisible by the 7 devices of this run",
    ]
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    (absent,) = problems(check_devices(None, None, is_stored=False, timeout_s=60))
    assert "JAX finds no devices" in absent
    assert "abacus" in absent


def test_a_small_limit_of_open_files_and_a_full_disk_are_named(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        (few,) = problems(check_machine(None))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert few == f"at most 512 open files: ulimit -n 1024 (the hard limit is {limits[1]})"

    assert problems(check_disks(RunFolder(tmp_path))) == []
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "checkpoints" / "20" / "state").touch()
    os.truncate(tmp_path / "checkpoints" / "20" / "state", 2**43)  # sparse: it takes no room, and needs twice as much
    (full,) = problems(check_disks(RunFolder(tmp_path)))
    assert full.startswith("workdir: only ")
    assert full.endswith("make room; 16.0 TiB should be")


def test_what_does_not_answer_is_left_behind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.json")  # whoever opens it waits for a writer
    topics = dict(itertools.islice(examine(tmp_path, None, timeout_s=0.5), 2))
    assert problems(topics["versions"]) == problems(check_versions()) == []
    assert problems(topics["recipe"]) == ["no answer within 0.5 s: a disk or driver hangs; look at it"]
    os.close(os.open(tmp_path / "recipe.json", os.O_WRONLY))  # lets the thread end
