"""`nfnet doctor` on things that are really broken: it names each with its remedy, changes nothing, never hangs."""

import dataclasses
import itertools
import os
import re
import resource
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.doctor import check_data, check_devices, check_disks, check_machine, check_versions, examine
from nfnet_flax.recipe import Recipe, save_recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.inspection import Finding, check_workdir
from tests import runs
from tests.image_sets import CLASSES, make_folder


def digits() -> Recipe:
    return load_recipe(runs.DIGITS)


def of_folder(root: Path) -> Recipe:
    """The digits recipe on an image folder."""
    recipe = digits()
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=FolderSource(root=str(root))))


def save_checkpoint(folder: Path) -> None:
    """A real one, of a small array."""
    handlers = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), notes=ocp.JsonCheckpointHandler())
    state, notes = ocp.args.StandardSave({"a": jnp.arange(8.0)}), ocp.args.JsonSave({"evaluated": True})
    with ocp.Checkpointer(handlers) as writer:
        writer.save(folder, args=ocp.args.Composite(state=state, notes=notes))


def problems(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.is_wrong]


def test_the_command_names_all_that_is_broken_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.py"
    text = runs.DIGITS.read_text().replace("import DigitsSource", "import FolderSource")
    recipe.write_text(text.replace("DigitsSource()", f"FolderSource(root={str(tmp_path / 'nowhere')!r})"))
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "40").mkdir(parents=True)
    save_recipe(digits(), workdir / "recipe.json")
    os.truncate(workdir / "recipe.json", 100)
    (workdir / "input.json").write_text("{}")

    def everything() -> list[tuple[str, int, int]]:
        paths = sorted(tmp_path.rglob("*"))
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    before = everything()
    assert cli.main(["doctor", "--workdir", str(workdir), "--recipe", str(recipe)]) == exit_codes.EXIT_WRONG
    printed = capsys.readouterr().out
    lines = [line.partition("WRONG: ")[2] for line in printed.splitlines() if "WRONG: " in line]
    assert len(lines) == 3, printed
    assert str(tmp_path / "nowhere") in lines[0]
    assert lines[1] == (
        f"{workdir / 'checkpoints' / '40'} is damaged (_CHECKPOINT_METADATA is missing): move it away to begin anew"
    )
    assert "no recipe can be read" in lines[2]
    assert lines[2].endswith("move the file away; nfnet train with the run's own recipe writes it again")
    assert printed.endswith("3 wrong, as marked above\n")
    assert everything() == before


def test_a_healthy_machine_needs_no_workdir(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--recipe", str(runs.DIGITS)]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    assert "x cpu" in printed
    assert "train: 1437 examples of 10 classes; the first is 32 x 32 px" in printed
    assert printed.endswith("nothing is wrong\n")


def test_a_run_is_seen_as_it_is(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    assert [finding.text for finding in check_workdir(workdir, None)] == [
        f"{workdir} does not exist yet; nfnet train makes it"
    ]
    workdir.mkdir()
    assert [finding.text for finding in check_workdir(workdir, None)][1:] == [
        "checkpoints: none",
        "best: none",
        "no run has begun here",
    ]
    runs.claimed(workdir, digits())
    for step in (20, 40, 60):
        save_checkpoint(workdir / "checkpoints" / str(step))
    (workdir / "checkpoints" / "80.orbax-checkpoint-tmp").mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tr')
    findings = check_workdir(workdir, digits())
    assert problems(findings) == []
    text = "\n".join(finding.text for finding in findings)
    assert "checkpoints: steps 20, 40, 60; newest 60 of " in text
    assert "80.orbax-checkpoint-tmp is being written" in text
    assert "metrics: 1 rows, to step 1" in text
    assert problems(check_data(digits(), workdir)) == []


def test_damaged_checkpoints_and_files_are_named(tmp_path: Path) -> None:
    runs.claimed(tmp_path, digits())
    (tmp_path / "input.json").unlink()
    for step in (20, 40, 60):
        save_checkpoint(tmp_path / "checkpoints" / str(step))
    os.truncate(tmp_path / "checkpoints" / "40" / "state" / "_METADATA", 0)
    (tmp_path / "checkpoints" / "60" / "notes" / "metadata").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n{"step": 4}\n')
    recipe = dataclasses.replace(digits(), seed=7)
    assert problems(check_workdir(tmp_path, recipe)) == [
        f"{tmp_path}/checkpoints/40 is damaged (state/_METADATA is empty): move it away to go on from step 20",
        f"{tmp_path}/checkpoints/60 is damaged (notes/metadata is missing): move it away to go on from step 20",
        f"line 2 of the 4 in {tmp_path}/metrics.jsonl is damaged: mend or delete the line; "
        "a resume drops all rows from it on",
        f"{tmp_path}/input.json is missing: put it back, or start in a new workdir",
        "the run has another recipe (seed: 0 -> 7): give its values back",
    ]
    (tmp_path / "recipe.json").unlink()
    assert problems(check_workdir(tmp_path, None))[-1].startswith(f"{tmp_path}/recipe.json is missing")
    assert problems(check_workdir(tmp_path / "metrics.jsonl", None)) == [
        f"{tmp_path}/metrics.jsonl is no folder: give another workdir"
    ]


def test_data_that_are_damaged_or_changed_are_named(tmp_path: Path) -> None:
    root, workdir = make_folder(tmp_path / "images"), tmp_path / "run"
    recipe = of_folder(root)
    runs.claimed(workdir, recipe)
    assert problems(check_data(recipe, workdir)) == []
    few = dataclasses.replace(recipe, num_classes=2)
    assert problems(check_data(few, None)) == ["num_classes = 2: must be at least 3"]

    added = root / "train" / CLASSES[0] / "added.JPEG"
    added.write_bytes((root / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG").read_bytes())
    number, fingerprint = problems(check_data(recipe, workdir))
    assert number == "the run began with another input (source.num_examples: 12 -> 13): give it back"
    assert "source.fingerprint" in fingerprint
    for path in (root / "val").rglob("*.JPEG"):
        os.truncate(path, path.stat().st_size // 2)
    train, damaged = check_data(recipe, workdir)
    assert train.text.startswith("train: 13 examples of 3 classes")
    assert damaged.is_wrong
    assert re.search(r"ILSVRC2012_val_\d+.JPEG \(example 0\): damaged", damaged.text)


def test_devices_that_are_missing_hang_or_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (hangs,) = problems(check_devices(None, timeout_s=0.05))
    assert "no answer within 0.05 s" in hangs
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=7")
    findings = check_devices(digits(), timeout_s=60)
    assert findings[0].text == "7 x cpu (cpu)"
    assert problems(findings) == [
        "data.batch_size = 64: must be divisible by the 7 devices",
        "data.eval_batch_size = 120: must be divisible by the 7 devices",
        "execution.num_microbatches = 8: must be divisible by the 7 devices",
    ]
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    (absent,) = problems(check_devices(None, timeout_s=60))
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

    assert problems(check_disks(tmp_path)) == []
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "checkpoints" / "20" / "state").touch()
    os.truncate(tmp_path / "checkpoints" / "20" / "state", 2**43)  # sparse: it takes no room, and needs twice as much
    (full,) = problems(check_disks(tmp_path))
    assert full.startswith("workdir: only ")
    assert full.endswith("make room; 16.0 TiB should be")


def test_what_does_not_answer_is_left_behind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.json")  # whoever opens it waits for a writer
    topics = dict(itertools.islice(examine(tmp_path, None, timeout_s=0.5), 2))
    assert problems(topics["versions"]) == problems(check_versions()) == []
    assert problems(topics["recipe"]) == ["no answer within 0.5 s: a disk or driver hangs; look at it"]
    os.close(os.open(tmp_path / "recipe.json", os.O_WRONLY))  # lets the thread end
