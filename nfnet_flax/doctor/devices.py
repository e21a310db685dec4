"""Checks of the devices of this host, and whether a run fits on them. Another process looks for the devices."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import differences
from nfnet_flax.doctor.findings import Finding, seen, wrong
from nfnet_flax.json_files import read_json
from nfnet_flax.parallel.mesh import LayoutProblem, layout_problems
from nfnet_flax.training.layout import ENVIRONMENT
from nfnet_flax.units import human_size

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe

_PROBE = """
import json, sys
from nfnet_flax import runtime
runtime.prepare(reproducible="reproducible" in sys.argv)
import jax
found = [(d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit")) for d in jax.local_devices()]
print(json.dumps({"devices": found, "environment": runtime.environment()}))
"""
"""Program of the other process, which starts JAX as `nfnet train` does. It prints platform, kind and bytes of memory of
each device of this host, and the environment on which the last bits of a result depend."""
_DEVICE_FILES = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
"""File that exists if there is an accelerator -> the extra of this package that lets JAX use it."""
_CLUSTERS = {
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "GKE": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
}
"""Environment variables of a cluster: the first gives the index of this process, the second the number of processes or
the names of all hosts."""
_FREE_FIELDS = ("execution.fsdp", "execution.spatial")
"""Fields of the recipe that may change when a run continues."""
_MAX_PROCESSES = 64
"""Largest number of processes with as many devices as this one for which it is tested whether a run fits."""


def check_devices(recipe: "Recipe | None", workdir: Path | None, *, is_stored: bool, timeout_s: float) -> list[Finding]:
    """The devices that JAX finds on this host, and whether the recipe fits on them.

    Args:
      recipe: the recipe of the run; None: only the devices are reported.
      workdir: folder of the run, which need not have begun; None: there is none.
      is_stored: whether the recipe was stored by a run. Then the run may need more devices than one process has here.
      timeout_s: time within which the devices have to answer, in seconds.
    """
    reproducible = recipe is not None and recipe.execution.reproducible
    probed, error = _probe(["reproducible"] if reproducible else [], timeout_s)
    if error is not None:
        remedy = "end what else uses them, or repair the driver and JAX's extra"
        return [wrong(f"JAX finds no devices ({error})", remedy)]
    found = [tuple(device) for device in probed["devices"]]
    counts = Counter((kind, name, num_bytes) for name, kind, num_bytes in found)
    findings = [
        seen(f"{count} x {kind} ({name})" + (f", {human_size(num_bytes)} each" if num_bytes else ""))
        for (kind, name, num_bytes), count in counts.items()
    ]
    if {name for name, _, _ in found} == {"cpu"} and not os.environ.get("JAX_PLATFORMS"):
        for path, extra in _DEVICE_FILES.items():
            if Path(path).exists():
                findings.append(wrong(f"{path} exists, but JAX finds only CPUs", f"pip install 'nfnet_flax[{extra}]'"))
    if workdir is not None and (workdir / ENVIRONMENT).exists():
        findings += _check_environment(workdir / ENVIRONMENT, probed["environment"])
    cluster = next((name for name, variables in _CLUSTERS.items() if all(v in os.environ for v in variables)), None)
    if cluster is not None:
        index, size = (os.environ[variable] for variable in _CLUSTERS[cluster])
        size = size if size.isdecimal() else str(len(size.split(",")))
        return [*findings, seen(f"process {index} of {size} ({cluster}); the devices of the others are not visible")]
    findings.append(seen("1 process: the environment names no cluster that is known"))
    if recipe is not None:
        findings += _check_layout(recipe, len(found), found[0][0], is_stored=is_stored)
    return findings


def _check_layout(recipe: "Recipe", num_devices: int, platform: str, *, is_stored: bool) -> list[Finding]:
    problems = _layout_problems(recipe, [0] * num_devices, platform)
    if not is_stored or not problems:
        return [wrong(f"{field} = {value!r}", remedy) for field, value, remedy in problems]
    here = f"does not fit on the {num_devices} devices of one process here"
    for number in range(2, _MAX_PROCESSES + 1):
        processes = [index for index in range(number) for _ in range(num_devices)]
        if not _layout_problems(recipe, processes, platform):
            field, value, _ = problems[0]
            return [seen(f"{field} = {value!r} {here}, but on those of {number} processes like it")]
    return [
        seen(f"{field} = {value!r} {here} ({remedy}); it may change: give nfnet train another value, or other devices")
        if field in _FREE_FIELDS
        else wrong(f"{field} = {value!r}", remedy)
        for field, value, remedy in problems
    ]


def _layout_problems(recipe: "Recipe", processes: Sequence[int], platform: str) -> list[LayoutProblem]:
    data, execution = recipe.data, recipe.execution
    return layout_problems(
        processes,
        fsdp=execution.fsdp,
        spatial=execution.spatial,
        num_microbatches=execution.num_microbatches,
        batch_sizes={"data.batch_size": data.batch_size, "data.eval_batch_size": data.eval_batch_size},
        image_sizes={"data.image_size": data.image_size, "data.eval_image_size": data.eval_image_size},
        platform=platform,
    )


def _check_environment(stored: Path, environment: dict[str, str]) -> list[Finding]:
    try:
        before = read_json(stored, "move it away; nfnet train writes it again")
    except ConfigError as error:
        return [Finding(text=str(error), is_wrong=True)]
    changed = differences(before, environment)
    if not changed:
        return []
    text = f"another environment than the run's ({'; '.join(changed)}): it can continue here, with other last bits"
    return [seen(text)]


def _probe(options: list[str], timeout_s: float) -> tuple[dict[str, Any], str | None]:
    """The data that the probe prints, or the reason why it printed none."""
    # Without preallocation, so that the probe takes no memory away from a run that uses the devices.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    words = [sys.executable, "-c", _PROBE, *options]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return {}, f"no answer within {timeout_s:g} s; on a TPU of several hosts, it waits for the other hosts"
    if process.returncode != 0:
        return {}, (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return json.loads(printed.splitlines()[-1]), None
