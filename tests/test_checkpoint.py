"""Checkpoints: whole, damaged, half written; on one device and on several; on a disk that fails."""

import dataclasses
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.recipe import CheckpointConfig
from nfnet_flax.training import checkpoint
from nfnet_flax.training.fingerprints import fingerprints, host_fingerprint
from nfnet_flax.training.layout import SET_ASIDE
from nfnet_flax.training.restoring import restore_newest
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.state import TrainState
from nfnet_flax.training.storage import StorageFailed
from tests import runs

NOTES = {"evaluated": True, "metrics": {"eval_ema/top1": 0.5}}


def make_state(step: int, rows: int = 48) -> TrainState:
    """Several types and shapes; eight devices can divide some, into parts large enough for data files (1 KiB)."""
    rng = np.random.default_rng(step)
    params = {
        "stem.kernel": jnp.asarray(rng.standard_normal((3, 3, 5, rows), np.float32)),
        "head.bias": jnp.asarray(rng.standard_normal((7,), np.float32)),
    }
    halves = {"half": jnp.asarray(rng.standard_normal((rows, 3)), jnp.bfloat16)}
    counts = {"count": jnp.int32(step), "counts": jnp.asarray(rng.integers(-9, 9, (5,)), jnp.int32)}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={},
        opt_state=(halves, counts),
        ema_params=jax.tree.map(lambda value: value + 1, params),
        ema_batch_stats={},
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def save(workdir: Path, *steps: int) -> None:
    with checkpoint.open_manager(workdir, "checkpoints", keep=5) as manager:
        for step in steps:
            checkpoint.save(manager, make_state(step), step, NOTES)


def restored_step(workdir: Path, *, is_owner: bool = True) -> int:
    """The step that is restored, after a look at every bit of it."""
    restored = restore_newest(RunFolder(workdir), abstract(make_state(0)), is_owner=is_owner)
    assert restored is not None
    state, notes = restored
    step = int(state.step)
    assert notes == NOTES
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    return step


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Everything below a folder: path, size, time of the last change in ns."""
    paths = sorted(folder.rglob("*"))
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *paths]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2, 3)
    return workdir


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite_notes(folder: Path) -> None:
    path = folder / "notes" / "notes.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (lambda folder: flip(data_files(folder)[-1]), " instead of "),
    "truncated data": (lambda folder: truncate(data_files(folder)[-1]), "Error reading"),
    "deleted data": (lambda folder: data_files(folder)[-1].unlink(), "Error reading"),
    "deleted index": (lambda folder: (folder / "state" / "manifest.ocdbt").unlink(), "does not exist"),
    "changed metrics": (rewrite_notes, "is not what was saved"),
    "truncated notes": (lambda folder: truncate(folder / "notes" / "notes.json"), "JSONDecodeError"),
    "no notes": (lambda folder: shutil.rmtree(folder / "notes"), "notes.json is missing"),
    "empty folder": (empty, "an empty folder"),
    "a file": (replace_by_file, "a file in the place of a folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_skipped_and_made_anew(
    kind: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, reason = DAMAGE[kind]
    damage(run / "checkpoints" / "3")
    before = listing(run)
    assert restored_step(run, is_owner=False) == 2
    assert listing(run) == before
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{run / 'checkpoints' / '3'} is damaged and skipped: " in line
    assert reason in line

    assert restored_step(run) == 2
    assert f"moved to {run / SET_ASIDE / 'checkpoints-3'}" in capfd.readouterr().err
    assert (run / SET_ASIDE / "checkpoints-3").exists()
    save(run, 3)
    assert restored_step(run) == 3
    assert capfd.readouterr().err == ""


def test_all_later_ones_are_skipped_down_to_the_newest_good_one(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "7").mkdir()
    flip(data_files(run / "checkpoints" / "3")[-1])
    truncate(data_files(run / "checkpoints" / "2")[-1])
    assert restored_step(run) == 1
    assert capfd.readouterr().err.count("damaged and skipped") == 3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1"]


def test_without_a_good_one_the_run_does_not_start_over(run: Path) -> None:
    for step in "123":
        flip(data_files(run / "checkpoints" / step)[-1])
    before = listing(run)
    with pytest.raises(ConfigError, match=r"all checkpoints in .* are damaged: restore a good one"):
        restored_step(run)
    assert listing(run) == before


@pytest.mark.parametrize(
    "name",
    [
        "commit_success.txt",
        "_CHECKPOINT_METADATA",
        "state/_METADATA",
        "state/_sharding",
        "state/array_metadatas/process_0",
    ],
)
def test_what_is_not_needed_may_be_missing(name: str, run: Path) -> None:
    """The commit marker above all: a checkpoint is good if every array of it is what was saved."""
    (run / "checkpoints" / "3" / name).unlink()
    assert restored_step(run) == 3


def test_any_flipped_byte_is_harmless_or_noticed(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    files = [path for path in sorted((run / "checkpoints" / "3").rglob("*")) if path.is_file()]
    steps = []
    for path in files:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        steps.append(restored_step(run, is_owner=False))
        path.write_bytes(content)
    assert set(steps) == {2, 3}
    assert capfd.readouterr().err.count("damaged and skipped") == steps.count(2)


def test_what_a_kill_left_half_written_is_cleared(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = [run / "checkpoints" / "4.orbax-checkpoint-tmp-17", run / "best" / "2.orbax-checkpoint-tmp"]
    for folder in folders:
        shutil.copytree(run / "checkpoints" / "3", folder)
        (folder / "commit_success.txt").unlink()
    assert restored_step(run, is_owner=False) == 3
    assert all(folder.exists() for folder in folders)
    assert restored_step(run) == 3
    printed = capfd.readouterr().err
    for folder in folders:
        assert f"{folder} was never completed: deleted" in printed
        assert not folder.exists()


def test_a_damaged_best_one_is_chosen_anew(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "best").mkdir()
    shutil.copytree(run / "checkpoints" / "2", run / "best" / "2")
    rewrite_notes(run / "best" / "2")
    assert restored_step(run) == 3
    assert "damaged, so the best is chosen anew" in capfd.readouterr().err
    with checkpoint.open_manager(run, "best", keep=1) as best:
        assert checkpoint.read_newest_notes(best) is None
        checkpoint.save(best, make_state(2), 2, NOTES)
        assert checkpoint.read_newest_notes(best) == (2, NOTES)
        checkpoint.save(best, make_state(2), 2, {**NOTES, "evaluated": False})  # a repeated step replaces it
        assert checkpoint.read_newest_notes(best) == (2, {**NOTES, "evaluated": False})


def test_another_recipe_is_not_damage(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not fit this recipe \(3 entries\).*stored .*expected .*") as raised:
        restore_newest(RunFolder(run), abstract(make_state(0, rows=16)), is_owner=True)
    assert "params.stem.kernel: stored float32[3,3,5,48], expected float32[3,3,5,16]" in str(raised.value)
    assert not (run / SET_ASIDE).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_every_flipped_bit_changes_the_fingerprint(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for shape in ((), (1,), (3, 5), (2, 1, 7)):
        array = np.asarray(jnp.asarray(4 * rng.standard_normal(shape), dtype))
        want = host_fingerprint(array)
        assert fingerprints({"array": jnp.asarray(array)}) == {"array": want}
        for position in range(array.nbytes):
            for bit in range(1 if dtype == "bool" else 8):
                flipped = bytearray(array.tobytes())
                flipped[position] ^= 1 << bit
                assert host_fingerprint(np.frombuffer(flipped, array.dtype).reshape(shape)) != want


def test_exchanged_elements_and_pairs_of_signs_change_the_fingerprint() -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal(200).astype(np.float32)
    want = host_fingerprint(array)
    for _ in range(1000):
        one, other = rng.choice(len(array), 2, replace=False)
        exchanged, negated = array.copy(), array.copy()
        exchanged[[one, other]] = array[[other, one]]
        negated[[one, other]] *= -1
        assert want not in (host_fingerprint(exchanged), host_fingerprint(negated))


def test_fingerprints_refuse_what_they_do_not_know() -> None:
    with pytest.raises(TypeError, match="elements of 1, 2 or 4 bytes"):
        host_fingerprint(np.zeros(3))


SHARDED = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nfnet_flax.training import checkpoint
from nfnet_flax.training.fingerprints import fingerprints
from nfnet_flax.training.restoring import restore_newest
from nfnet_flax.training.run_folder import RunFolder
from tests.test_checkpoint import NOTES, abstract, flip, data_files, make_state

workdir, index, count, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, cluster_detection_method="deactivate",
                               coordinator_bind_address=f"127.0.0.1:{port}")
assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def target(state):
    def leaf(x):
        spec = P(None, None, None, ("b", "a")) if x.ndim == 4 else P("a", None) if x.ndim == 2 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(leaf, state)

def restored():
    state, notes = restore_newest(RunFolder(workdir), target(make_state(0)), is_owner=True)
    assert notes == NOTES and not state.params["stem.kernel"].is_fully_replicated
    assert fingerprints(state) == fingerprints(make_state(int(state.step)))
    return state

steps = [int(restored().step)]
state = restored()
with checkpoint.open_manager(workdir, "checkpoints", keep=5) as manager:
    for step in (4, 5):
        given = jax.tree.map(lambda x, t: jax.make_array_from_callback(x.shape, t.sharding, lambda i: np.asarray(x)[i]),
                             make_state(step), target(state))
        checkpoint.save(manager, given, step, NOTES)
if index == 0:
    flip(data_files(workdir / "checkpoints" / "5")[-1])
clocks = [checkpoint.SaveClock(minutes).is_due() for minutes in ((1e-9, 1e9) if index == 0 else (1e9, 1e-9))]
steps.append(int(restored().step))
print(json.dumps({"steps": steps, "clocks": clocks}), flush=True)
"""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_any_sharding_and_number_of_processes(num_processes: int, run: Path) -> None:
    """Written on one device, read and written on eight of one or two processes, read on one; damaged between."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(run), str(index), str(num_processes), port],
            env=runs.with_devices(8 // num_processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=runs.ROOT,
        )
        for index in range(num_processes)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (printed, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        assert json.loads(printed.splitlines()[-1]) == {"steps": [3, 4], "clocks": [True, False]}
    assert sum(errors.count("damaged and skipped") for _, errors in outputs) == 1
    assert restored_step(run) == 4
    assert (run / SET_ASIDE / "checkpoints-5").is_dir()


FULL = """
import os, resource, sys, time
from pathlib import Path
from nfnet_flax.training import checkpoint
from nfnet_flax.training.storage import StorageFailed
from tests.test_checkpoint import NOTES, make_state

with checkpoint.open_manager(Path(sys.argv[1]), "checkpoints", keep=5) as manager:
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    checkpoint.save(manager, make_state(4, rows=20_000), 4, NOTES)
    print("training goes on", flush=True)
    try:
        while True:
            checkpoint.check_written(manager)
            time.sleep(0.01)
    except StorageFailed as error:
        print(error, flush=True)
        os._exit(6)
"""


def test_a_failed_background_write_is_told_while_training_goes_on(run: Path) -> None:
    """No file may grow beyond 64 KiB: the kernel refuses the bytes, as it does on a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(run)], capture_output=True, text=True, timeout=60, check=False, cwd=runs.ROOT
    )
    assert done.returncode == 6, done.stderr
    assert re.fullmatch(rf"training goes on\n{run / 'checkpoints'}: .*File too large.*\n", done.stdout)
    assert restored_step(run) == 3


def test_a_folder_that_cannot_be_written_is_told_at_once(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    with (
        pytest.raises(StorageFailed, match=rf"{run / 'checkpoints'}: .*Not a directory"),
        checkpoint.open_manager(run, "checkpoints", keep=5) as manager,
    ):
        checkpoint.save(manager, make_state(4), 4, NOTES)


def test_the_clock_decides_when_a_checkpoint_is_due() -> None:
    assert not checkpoint.SaveClock(None).is_due()
    clock = checkpoint.SaveClock(0.001)  # 60 ms
    assert not clock.is_due()
    time.sleep(0.07)
    assert clock.is_due()
    clock.restart()
    assert not clock.is_due()


@pytest.mark.parametrize("field", ["every_steps", "keep_last", "every_minutes"])
def test_settings_are_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{field} = 0"):
        dataclasses.replace(CheckpointConfig(), **{field: 0})  # type: ignore[arg-type]
