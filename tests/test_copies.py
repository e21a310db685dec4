"""Copies of the state that differ between processes or devices end a run before they are saved."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_COPIES_DIFFER
from nfnet_flax.training.copies import compare_copies
from nfnet_flax.training.fingerprints import CopiesDiffer
from nfnet_flax.training.layout import steps_in
from tests import runs
from tests.test_processes import TINY, Store


def test_the_process_that_differs_is_named_with_the_arrays() -> None:
    common = {"params.a": "float32[2] 00000001", "params.b": "float32[2] 00000002"}
    other = common | {"params.b": "float32[2] 00000003"}
    store = Store(3)
    try:
        assert store.in_parallel(lambda index: compare_copies(store.processes[index], "equal", common, 1)) == [None] * 3

        def compare(index: int) -> None:
            compare_copies(store.processes[index], "unequal", other if index == 1 else common, 7)

        for error in store.in_parallel(compare):
            assert isinstance(error, CopiesDiffer)
            assert "different states at step 7 (processes 0, 2; process 1): params.b differ" in str(error)
            assert "between process 1 and process 0" in str(error)
    finally:
        store.close()


DEVICES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.fingerprints import CopiesDiffer, fingerprints

mesh = make_mesh(num_shares=2)
assert mesh.size == 4
values = np.arange(12, dtype=np.float32).reshape(3, 4)
for spec in (PartitionSpec(), PartitionSpec(None, "fsdp")):
    sharding = NamedSharding(mesh, spec)
    devices = list(sharding.addressable_devices_indices_map(values.shape))
    def array():
        placed = [jax.device_put(piece, device) for piece, device in zip(pieces, devices)]
        return jax.make_array_from_single_device_arrays(values.shape, sharding, placed)
    pieces = [values[index].copy() for index in sharding.addressable_devices_indices_map(values.shape).values()]
    fingerprints({"params": {"w": array()}})
    pieces[3].view(np.uint32)[0, 0] ^= 1
    try:
        fingerprints({"params": {"w": array()}})
    except CopiesDiffer as error:
        print(error)
"""


def test_devices_of_a_process_that_differ_are_noticed_whole_or_divided() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEVICES],
        capture_output=True,
        text=True,
        check=True,
        cwd=runs.ROOT,
        env=runs.with_devices(4),
    )
    assert done.stdout.count("the devices of this process hold different copies of params.w") == 2


# `nfnet train` in which one bit of this process's copy of a parameter flips after its sixth step. Of kernels there are
# no copies: each process has its share.
FLIPPED = """
import dataclasses, sys
import jax, numpy as np
from nfnet_flax import cli
from nfnet_flax.training import loop

def flipped(state):
    value = state.params["head.bias"]
    copy = np.array(value.addressable_data(0))
    copy.view(np.uint32)[0] ^= 1 << 21  # of the lowest bits the next updates would leave nothing
    copies = [jax.device_put(copy, device) for device in value.sharding.addressable_devices]
    bias = jax.make_array_from_single_device_arrays(value.shape, value.sharding, copies)
    return dataclasses.replace(state, params={**state.params, "head.bias": bias})

def assemble(*arguments, assemble=loop.assemble, **options):
    setup = assemble(*arguments, **options)
    def step(state, *others):
        state, metrics = setup.train_step(state, *others)
        return (flipped(state) if int(state.step) == 6 else state), metrics
    return dataclasses.replace(setup, train_step=step)

if __name__ == "__main__":
    loop.assemble = assemble
    sys.exit(cli.main(sys.argv[1:]))
"""
SHORT = (*TINY, "--checkpoint.every-steps=4")


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run whose second process lost a bit after step 6, and what the first one printed."""
    workdir = tmp_path_factory.mktemp("drifted") / "run"
    processes = runs.start_all(workdir, 2, *SHORT, program_of_last=("-c", FLIPPED))
    printed = [runs.finish(process) for process in processes]
    assert [process.returncode for process in processes] == [EXIT_COPIES_DIFFER] * 2, printed
    return workdir, printed[0]


def test_a_flipped_bit_in_one_process_ends_the_run_at_the_next_save(drifted: tuple[Path, str]) -> None:
    workdir, printed = drifted
    assert "hold different states at step 8 (process 0; process 1)" in printed
    assert "params.head.bias" in printed
    assert steps_in(workdir / "checkpoints") == [4]


def test_the_last_good_checkpoint_goes_on(drifted: tuple[Path, str], tmp_path: Path) -> None:
    run = shutil.copytree(drifted[0], tmp_path / "run")
    process = runs.start(run, *SHORT)
    printed = runs.finish(process)
    assert process.returncode == 0, printed
    assert "continuing from step 4" in printed


@pytest.mark.parametrize(
    ("environment", "fact"),
    [
        ({"JAX_DEFAULT_PRNG_IMPL": "rbg"}, "jax_default_prng_impl: threefry2x32 in process 0, rbg in process 1"),
        ({"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}, "XLA_FLAGS:  in process 0, --xla_cpu_max_isa=AVX2 in process 1"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
            "devices of each process: 1 in process 0, 3 in process 1",
        ),
    ],
    ids=["random numbers", "processor", "devices"],
)
def test_processes_that_would_drift_apart_are_told_before_the_first_step(
    environment: dict[str, str], fact: str, tmp_path: Path
) -> None:
    processes = runs.start_all(
        tmp_path / "run", 2, *SHORT, environment={"XLA_FLAGS": ""}, environment_of_last=environment
    )
    printed = [runs.finish(process) for process in processes]
    assert [process.returncode for process in processes] == [EXIT_BAD_INPUT] * 2, printed
    assert fact in printed[0]
    assert not (tmp_path / "run").exists()
