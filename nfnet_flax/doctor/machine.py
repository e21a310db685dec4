"""Checks of versions, processors, limits and disks."""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nfnet_flax
from nfnet_flax.doctor.findings import Finding, nearest, seen, tree_bytes, wrong
from nfnet_flax.training.layout import CHECKPOINT_KINDS
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.units import human_size

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "opencv-python-headless", "simplejpeg")
_TENSORFLOWS = ("tensorflow", "tensorflow-cpu")
"""Packages that contain the module `tensorflow`."""
_MIN_FREE_BYTES = 2**30
_MIN_OPEN_FILES = 1024
"""Smallest limit of open files, in addition to the shards of the set, each of which stays open after the first read."""


def check_versions() -> list[Finding]:
    """Versions of the packages that a run needs; a missing package is a problem, except TensorFlow."""
    found = [f"Python {platform.python_version()}", f"nfnet_flax {nfnet_flax.__version__}"]
    versions = {name: _version(name) for name in _PACKAGES}
    found += [f"{name} {version}" for name, version in versions.items() if version is not None]
    missing = [name for name, version in versions.items() if version is None]
    if importlib.util.find_spec("tensorflow") is None:  # looked for, not imported: that takes seconds
        found.append("no TensorFlow: metrics.jsonl, but no TensorBoard files")
    else:
        known = (f"{name} {version}" for name in _TENSORFLOWS if (version := _version(name)) is not None)
        found.append(next(known, "TensorFlow of an unknown package"))
    return [seen(", ".join(found)), *(wrong(f"{name} is not installed", f"pip install {name}") for name in missing)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_machine(recipe: "Recipe | None") -> list[Finding]:
    """CPUs, and the limit of open files."""
    limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    findings = [seen(f"{usable_cpus()} CPUs, {platform.system()} {platform.machine()}, at most {limit} open files")]
    wanted = _MIN_OPEN_FILES + (0 if recipe is None else recipe.data.source.num_open_files())
    if limit != resource.RLIM_INFINITY and limit < wanted:
        findings.append(wrong(f"at most {limit} open files", f"ulimit -n {wanted} (the hard limit is {hard_limit})"))
    if recipe is not None and recipe.data.num_workers > 0:
        shared = f"{human_size(shutil.disk_usage('/dev/shm').total)}" if Path("/dev/shm").is_dir() else "none"
        findings.append(seen(f"/dev/shm: {shared}; the input's worker processes do not use it"))
    return findings


def check_disks(folder: RunFolder | None) -> list[Finding]:
    """Free space where the run writes."""
    places = {"compilation cache": _compilation_cache()}
    wanted = {}
    if folder is not None:
        is_here = folder.mirror is None
        name, place = ("workdir", folder.path) if is_here else ("temporary files", Path(tempfile.gettempdir()))
        places = {name: place, **places}
        sizes = [tree_bytes(path) for kind in CHECKPOINT_KINDS for path in (folder.path / kind).glob("*")]
        wanted[name] = 2 * max(sizes, default=0)  # a new checkpoint is complete before an old one is deleted
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
