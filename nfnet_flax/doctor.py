"""What a run will meet on this machine, and what is wrong with it: `nfnet doctor`. It reads, and changes nothing.

Every check runs in a thread of its own and has only so much time, as a disk that does not answer holds its reader up
for ever. Devices are looked for in another process: a driver that hangs can only be killed.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nfnet_flax
from nfnet_flax.config import ConfigError, differences
from nfnet_flax.training.inspection import KINDS, Finding, check_workdir, human_size, nearest, seen, tree_bytes, wrong

if TYPE_CHECKING:
    from nfnet_flax.data.random_access import Source, Split
    from nfnet_flax.recipe import Recipe

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "opencv-python-headless", "simplejpeg")
_PROBE = """
import json, jax
found = [(d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit")) for d in jax.local_devices()]
print(json.dumps(found))
"""
"""Run by itself; prints platform, kind and bytes of memory of each device of this host."""
_DEVICE_FILES = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
"""What shows that there is an accelerator -> the extra that lets JAX use it."""
_CLUSTERS = {
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "GKE": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
}
"""Environment variables with the index of this process, and with the number or the hosts of all."""
_MIN_FREE_BYTES = 2**30
_MIN_OPEN_FILES = 1024
"""Besides the shards of the set, each of which stays open once it was read."""

Check = Callable[[], list[Finding]]


def examine(workdir: Path | None, recipe_path: str | None, *, timeout_s: float) -> Iterator[tuple[str, list[Finding]]]:
    """Yields topics and what was found, as it is found.

    Args:
      workdir: folder of a run, begun or not; None: no run is looked into.
      recipe_path: of a recipe file, with its arguments; None: the recipe that is stored in the workdir, if any.
      timeout_s: for each check. One that has not ended by then is a finding.
    """
    recipes: list[Recipe] = []
    yield "versions", _within(timeout_s, check_versions)
    yield "recipe", _within(timeout_s, functools.partial(_check_recipe, workdir, recipe_path, recipes))
    recipe = recipes[0] if recipes else None
    yield "devices", _within(timeout_s + 10, functools.partial(check_devices, recipe, timeout_s=timeout_s))
    yield "machine", _within(timeout_s, functools.partial(check_machine, recipe))
    if recipe is not None:
        yield "data", _within(timeout_s, functools.partial(check_data, recipe, workdir))
    if workdir is not None:
        yield "workdir", _within(timeout_s, functools.partial(check_workdir, workdir, recipe))
    yield "disks", _within(timeout_s, functools.partial(check_disks, workdir))


def _check_recipe(workdir: Path | None, recipe_path: str | None, recipes: "list[Recipe]") -> list[Finding]:
    """Adds the recipe to `recipes`, if there is one."""
    from nfnet_flax.recipe import read_recipe
    from nfnet_flax.recipe_file import load_recipe

    if recipe_path is not None:
        recipes.append(load_recipe(recipe_path))
    elif workdir is not None and (workdir / "recipe.json").exists():
        with contextlib.suppress(ConfigError):  # for `check_workdir` to say
            recipes.append(read_recipe(workdir / "recipe.json"))
    return [seen(recipe.name) for recipe in recipes] or [seen("none, so no data are looked into")]


def describe(topic: str, findings: list[Finding]) -> str:
    """The lines of a topic."""
    lines = [("WRONG: " if finding.is_wrong else "") + " ".join(finding.text.split()) for finding in findings]
    return "\n".join(f"{topic if index == 0 else '':<10}{line}" for index, line in enumerate(lines))


def _within(timeout_s: float, check: Check) -> list[Finding]:
    """What a check finds; an error that it raises, and that it does not end in time, are findings, too."""
    found: list[list[Finding]] = []

    def run() -> None:
        try:
            found.append(check())
        except ConfigError as error:  # its message says what to do
            found.append([Finding(text=str(error), is_wrong=True)])
        except Exception as error:
            found.append([wrong(f"{type(error).__name__}: {error}", "this check could not be finished")])

    thread = threading.Thread(target=run, name="check", daemon=True)  # one that is stuck must not keep us
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else [wrong(f"no answer within {timeout_s:g} s", "a disk or driver hangs; look at it")]


def check_versions() -> list[Finding]:
    """Versions of what decides a run; a package that is missing is a problem, TensorFlow excepted."""
    found, missing = [f"Python {platform.python_version()}", f"nfnet_flax {nfnet_flax.__version__}"], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    has_tensorflow = importlib.util.find_spec("tensorflow") is not None  # found, not imported: that takes seconds
    found.append("TensorFlow" if has_tensorflow else "no TensorFlow: metrics.jsonl, but no TensorBoard files")
    return [seen(", ".join(found)), *(wrong(f"{name} is not installed", f"pip install {name}") for name in missing)]


def check_devices(recipe: "Recipe | None", *, timeout_s: float) -> list[Finding]:
    """The devices that JAX finds on this host, and whether the batches of the recipe divide over them."""
    found, error = _probe(timeout_s)
    if error is not None:
        return [wrong(f"JAX finds no devices ({error})", "end what else uses them, or mend driver and JAX's extra")]
    counts = Counter((kind, name, num_bytes) for name, kind, num_bytes in found)
    findings = [
        seen(f"{count} x {kind} ({name})" + (f", {human_size(num_bytes)} each" if num_bytes else ""))
        for (kind, name, num_bytes), count in counts.items()
    ]
    if {name for name, _, _ in found} == {"cpu"} and not os.environ.get("JAX_PLATFORMS"):
        for path, extra in _DEVICE_FILES.items():
            if Path(path).exists():
                findings.append(wrong(f"{path} exists, but JAX finds only CPUs", f"pip install 'nfnet_flax[{extra}]'"))
    cluster = next((name for name, variables in _CLUSTERS.items() if all(v in os.environ for v in variables)), None)
    if cluster is not None:
        index, size = (os.environ[variable] for variable in _CLUSTERS[cluster])
        size = size if size.isdecimal() else str(len(size.split(",")))
        return [*findings, seen(f"process {index} of {size} ({cluster}); the devices of the others are not seen")]
    findings.append(seen("1 process: the environment names no cluster that is known"))
    if recipe is not None:
        numbers = {
            "data.batch_size": recipe.data.batch_size,
            "data.eval_batch_size": recipe.data.eval_batch_size,
            "execution.num_microbatches": recipe.execution.num_microbatches,
        }
        for name, number in numbers.items():
            if number is not None and number % len(found) != 0:
                findings.append(wrong(f"{name} = {number}", f"must be divisible by the {len(found)} devices"))
    return findings


def _probe(timeout_s: float) -> tuple[list[tuple[str, str, int | None]], str | None]:
    """Platform, kind and bytes of memory of each device, or why there are none."""
    # Without preallocation, so that a run that uses the devices loses nothing.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    words = [sys.executable, "-c", _PROBE]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return [], f"no answer within {timeout_s:g} s; on a TPU of several hosts, it waits for the other hosts"
    if process.returncode != 0:
        return [], (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return [tuple(device) for device in json.loads(printed.splitlines()[-1])], None


def check_machine(recipe: "Recipe | None") -> list[Finding]:
    """CPUs, and the limit of open files."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    findings = [seen(f"{num_cpus} CPUs, {platform.system()} {platform.machine()}, at most {limit} open files")]
    wanted = _MIN_OPEN_FILES + (0 if recipe is None else _num_shards(recipe))
    if limit != resource.RLIM_INFINITY and limit < wanted:
        findings.append(wrong(f"at most {limit} open files", f"ulimit -n {wanted} (the hard limit is {hard_limit})"))
    if recipe is not None and recipe.data.num_workers > 0:
        shared = f"{human_size(shutil.disk_usage('/dev/shm').total)}" if Path("/dev/shm").is_dir() else "none"
        findings.append(seen(f"/dev/shm: {shared}; the input's worker processes do not use it"))
    return findings


def _num_shards(recipe: "Recipe") -> int:
    from nfnet_flax.data.array_records import find_shards
    from nfnet_flax.data.source_config import ArrayRecordSource

    source = recipe.data.source
    if not isinstance(source, ArrayRecordSource):
        return 0
    with contextlib.suppress(ConfigError):  # for `check_data` to say
        return len(find_shards(source.train, "source.train")) + len(find_shards(source.eval, "source.eval"))
    return 0


def check_data(recipe: "Recipe", workdir: Path | None) -> list[Finding]:
    """Opens both splits and decodes an image of each; compares them with what the run in the workdir began with."""
    from nfnet_flax.data.pipeline import input_identity, open_split

    findings, sources = [], {}
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        try:
            sources[split] = open_split(recipe.data, split)
            findings.append(seen(f"{split}: {_first_example(sources[split])}"))
            findings += [seen(found.text) for found in sources[split].unused]
        except ConfigError as error:  # its message says what to do
            return [*findings, Finding(text=str(error), is_wrong=True)]
    num_classes = max(len(source.class_names) for source in sources.values())
    if recipe.num_classes < num_classes:
        findings.append(wrong(f"num_classes = {recipe.num_classes}", f"must be at least {num_classes}"))
    stored = None if workdir is None else workdir / "input.json"
    if stored is not None and stored.exists():
        now = input_identity(recipe.data, seed=recipe.seed, train_source=sources["train"], eval_source=sources["eval"])
        try:
            changed = differences(json.loads(stored.read_text()), now)
        except ValueError as error:
            return [*findings, wrong(f"{stored} is damaged ({error})", "start in a new workdir")]
        findings += [wrong(f"the run began with another input ({line})", "give it back") for line in changed]
    return findings


def _first_example(source: "Source") -> str:
    from nfnet_flax.data.decode import decode
    from nfnet_flax.data.examples import naming

    with naming(source, 0):
        image = source[0]["image"]
        pixels = decode(image) if isinstance(image, bytes) else image
    size = f"{pixels.shape[1]} x {pixels.shape[0]} px"
    num_unused = sum(found.num_files for found in source.unused)
    unused = f", {num_unused} files are not used" if num_unused else ""
    return f"{len(source)} examples of {len(source.class_names)} classes{unused}; the first is {size}"


def check_disks(workdir: Path | None) -> list[Finding]:
    """Free space where the run writes."""
    places = {"compilation cache": _compilation_cache()}
    wanted = {}
    if workdir is not None:
        places = {"workdir": workdir, **places}
        sizes = [tree_bytes(path) for kind in KINDS for path in (workdir / kind).glob("*")]
        wanted["workdir"] = 2 * max(sizes, default=0)  # a new one is whole before an old one is deleted
    findings = []
    for name, path in places.items():
        if path is None:
            findings.append(seen(f"{name}: none"))
            continue
        usage = shutil.disk_usage(nearest(path))
        findings.append(seen(f"{name}: {human_size(usage.free)} of {human_size(usage.total)} are free at {path}"))
        least = max(_MIN_FREE_BYTES, wanted.get(name, 0))
        if usage.free < least:
            remedy = f"make room; {human_size(least)} should be"
            findings.append(wrong(f"{name}: only {human_size(usage.free)} are free at {path}", remedy))
    return findings


def _compilation_cache() -> Path | None:
    import jax

    from nfnet_flax.runtime import default_folder

    settings: dict[str, Any] = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return None
    return Path(settings["jax_compilation_cache_dir"] or default_folder())
