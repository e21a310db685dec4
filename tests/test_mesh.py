"""Which devices, batches and images fit together, and how it is said when they do not."""

import subprocess
import sys
from typing import Any

import jax
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.parallel.mesh import LayoutProblem, count_turns, layout_problems, make_mesh
from tests import runs
from tests.test_processes import free_port

FITS: dict[str, Any] = {"batch_sizes": {"data.batch_size": 64}, "image_sizes": {"data.image_size": 32}}


def fields(problems: list[LayoutProblem]) -> list[str]:
    return [problem.field for problem in problems]


@pytest.mark.parametrize(
    ("processes", "fsdp", "spatial"), [([0], 1, 1), ([0] * 8, 8, 1), ([0, 0, 1, 1], 2, 1), ([0, 0, 1, 1], 2, 2)]
)
def test_what_fits_has_no_problem(processes: list[int], fsdp: int, spatial: int) -> None:
    assert layout_problems(processes, fsdp=fsdp, spatial=spatial, num_microbatches=8, **FITS) == []


def test_every_problem_is_named_with_its_value() -> None:
    assert layout_problems([0] * 6, fsdp=4, spatial=1, num_microbatches=8, **FITS) == [
        ("execution.fsdp", 4, "must divide the 6 devices of this run"),
        ("execution.num_microbatches", 8, "must be a multiple of the 6 devices of this run"),
        ("data.batch_size", 64, "must be divisible by the 6 devices of this run"),
    ]
    assert layout_problems([0] * 4, fsdp=1, spatial=3, num_microbatches=8, **FITS) == [
        ("execution.spatial", 3, "must divide the 4 devices of this run"),
        ("data.image_size", 32, "must be divisible by execution.spatial = 3"),
    ]
    parts = layout_problems([0] * 4, fsdp=1, spatial=2, num_microbatches=6, batch_sizes={"data.batch_size": 64})
    assert parts == [("data.batch_size", 64, "must be divisible by execution.num_microbatches = 6")]
    assert fields(layout_problems([0, 0, 0, 1], fsdp=1, spatial=1)) == ["devices"]
    assert layout_problems([0, 0, 0, 1], fsdp=1, spatial=1)[0].value == {0: 3, 1: 1}
    assert fields(layout_problems([0, 1, 0, 1], fsdp=1, spatial=1)) == ["devices"]
    assert fields(layout_problems([0, 1, 2], fsdp=1, spatial=3)) == ["execution.spatial"]


def test_images_are_not_divided_over_gpus() -> None:
    for platform in ("cpu", "tpu", None):
        assert layout_problems([0] * 4, fsdp=1, spatial=2, platform=platform, **FITS) == []
    ((field, value, remedy),) = layout_problems([0] * 4, fsdp=1, spatial=2, platform="gpu", **FITS)
    assert (field, value) == ("execution.spatial", 2)
    assert remedy.startswith("must be 1 on GPUs, where the compiler gathers the activations of grouped convolutions")
    assert "execution.rematerialization = blocks" in remedy
    assert layout_problems([0] * 4, fsdp=1, spatial=1, platform="gpu", **FITS) == []


def test_one_device_takes_any_number_of_parts_and_no_division() -> None:
    mesh = make_mesh(jax.devices()[:1])
    assert [count_turns(parts, mesh) for parts in (None, 1, 12)] == [1, 1, 12]
    with pytest.raises(ConfigError, match=r"execution\.fsdp = 2: must divide the 1 devices of this run"):
        make_mesh(jax.devices()[:1], fsdp=2)
    with pytest.raises(ConfigError, match=r"num_shares = 2: must be one of \[1\]"):
        make_mesh(jax.devices()[:1], num_shares=2)


PROCESS = """
import sys
import jax
from nfnet_flax.config import ConfigError
from nfnet_flax.parallel.mesh import make_mesh

index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
for devices in (None, [jax.devices()[-1], jax.devices()[0]]):
    try:
        make_mesh(devices)
    except ConfigError as error:
        print(error)
"""

# A stage of 8 blocks, so that parameters are stacked, divided over the devices of two processes.
WEIGHTS = """
import sys
import jax, numpy as np, optax
from nfnet_flax.models import NFNetConfig
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import abstract_state, model_structure, with_weights

index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
config = NFNetConfig(widths=(8, 8, 8, 8), depths=(1, 1, 8, 1), group_width=4)
structure = model_structure(config, 3)
rng = np.random.default_rng(0)

def drawn(leaf):
    whole = rng.standard_normal(leaf.shape).astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

state = jax.tree.map(drawn, abstract_state(structure, optax.identity(), make_mesh(fsdp=2)))

given = {name: rng.standard_normal(shape.shape) for name, shape in structure.shapes.items()}
for name in [name for name in given if name.startswith(("head.", "stages.2.3."))]:
    del given[name]
moved = with_weights(state, given)
assert not moved.params["stages.2.1.conv0.kernel"].is_fully_addressable
for before, after in ((state.params, moved.params), (state.ema_params, moved.ema_params)):
    for name in structure.shapes:
        for old, new in zip(before[name].addressable_shards, after[name].addressable_shards, strict=True):
            want = given[name][new.index].astype(np.float32) if name in given else np.asarray(old.data)
            assert np.asarray(new.data).tobytes() == want.tobytes(), name
print("equal")
"""


def run_two(script: str, *num_devices: int) -> list[str]:
    """What two processes with so many devices print."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(index), str(port)],
            env=runs.with_devices(count),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, count in enumerate(num_devices)
    ]
    printed = []
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        printed.append(output)
    return printed


def test_processes_with_unequal_devices_and_devices_out_of_order_are_refused() -> None:
    for printed in run_two(PROCESS, 2, 1):
        unequal, disordered = printed.splitlines()
        assert unequal.startswith("devices = {0: 2, 1: 1}: every process must have the same number of devices")
        assert disordered.startswith("devices = 'one of process 0 after one of process 1': must be ordered by process")


def test_weights_are_put_where_parameters_are_divided_over_processes() -> None:
    for printed in run_two(WEIGHTS, 1, 1):
        assert printed.splitlines()[-1] == "equal"
